"""Requests of lmms-eval that several processes answer together."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import chain
from typing import Any

from torch import distributed as dist
from torch.distributed import ProcessGroup

from strategy.distributed import processes, watchdog

PADDING_MARK = "__padding_only__"  # lmms-eval's key in the metadata of a request
_FUNCTION = ...  # stands for a function of a request, which does not travel


def is_padding_request(request: Any) -> bool:
    """Return whether lmms-eval made a request only to even out the ranks, and discards the answer."""
    return bool((request.metadata or {}).get(PADDING_MARK))


def answer_longest_first(answer: Callable[[list[Any]], list[Any]], requests: Sequence[Any]) -> list[Any]:
    """Answer lmms-eval's requests task by task, within a task those with the longest texts first.

    Returns:
        The answers, in the order of the requests.
    """
    tasks: dict[Any, int] = {}

    def place(number: int) -> tuple[int, int]:
        text, *_, task, split = requests[number].args
        return tasks.setdefault((task, split), len(tasks)), -len(text)

    order = sorted(range(len(requests)), key=place)
    answers = dict(zip(order, answer([requests[number] for number in order]), strict=True))
    return [answers[number] for number in range(len(requests))]


def answer_own(requests: Sequence[Any], answer: Callable[[list[Any]], list[Any]], empty_answer: Any) -> list[Any]:
    """Answer lmms-eval's requests, then wait for the ranks that are still answering.

    Padding requests get `empty_answer`, since they would count twice in the run record. Among several processes an
    error ends this process, and so all of them.
    """
    if processes.world_size() == 1:
        return answer(list(requests))
    padding = [is_padding_request(request) for request in requests]
    own = [request for request, pads in zip(requests, padding, strict=True) if not pads]
    watchdog.begin_answering()
    with watchdog.abort_all_on_error():
        answers = iter(answer(own))
    watchdog.finish_answering()
    return [empty_answer if pads else next(answers) for pads in padding]


def pool_requests(requests: Sequence[Any], group: ProcessGroup | None) -> tuple[list[Any], slice]:
    """Share the requests that lmms-eval makes to the ranks of a group; all ranks of the group call it.

    The functions in a request belong to its task, and each rank inserts its own ones.

    Returns:
        The requests of all ranks, and which of them are this rank's own.

    Raises:
        ValueError: On all ranks, for a task of which some ranks have no question.
    """
    if group is None:
        return list(requests), slice(None)
    own = {request.task_name: request for request in requests}
    sent = [
        (
            request.task_name,
            is_padding_request(request),
            [_FUNCTION if callable(part) else part for part in request.args],
        )
        for request in requests
    ]
    everyone: list[Any] = [None] * group.size()
    dist.all_gather_object(everyone, sent, group=group)
    tasks = [{task for task, *_ in each} for each in everyone]
    if short := set().union(*tasks) - set.intersection(*tasks):
        raise ValueError(
            f"task {', '.join(map(repr, sorted(short)))} has fewer questions than there are processes "
            f"({processes.world_size()}), and lmms-eval added no padding requests: start fewer processes"
        )
    before = sum(map(len, everyone[: group.rank()]))
    pooled = []
    for task, pads, parts in chain.from_iterable(everyone):
        local = own[task]
        arguments = (function if part is _FUNCTION else part for part, function in zip(parts, local.args, strict=True))
        pooled.append(replace(local, arguments=tuple(arguments), metadata=local.metadata | {PADDING_MARK: pads}))
    return pooled, slice(before, before + len(sent))
