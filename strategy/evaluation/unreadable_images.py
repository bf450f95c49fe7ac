"""Pictures of an evaluation that cannot be read: told by name, and no reason to lose the other answers.

It speaks lmms-eval's language, requests and documents, without importing it.
"""

from collections.abc import Callable, Iterator, Mapping
from copy import deepcopy
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

from strategy.distributed import watchdog

# What a chat form is given in place of messages whose pictures cannot be read.
NOTHING = [{"role": "user", "content": [{"type": "text", "text": "?"}]}]


class Unreadable(NamedTuple):
    """A document whose pictures cannot be decoded, and why."""

    reason: str


class Documents:
    """A split of a task, whose documents with unreadable pictures come as `Unreadable`.

    ask: told of each document that is asked for, by its number.
    """

    def __init__(self, split: Any, ask: Callable[[int], None]) -> None:
        self.split, self.ask = split, ask

    def __len__(self) -> int:
        return len(self.split)

    def __getitem__(self, number: int) -> Any:
        if not 0 <= number < len(self.split):
            raise IndexError(f"document {number} of {len(self.split)}")
        self.ask(number)
        watchdog.heartbeat()
        try:
            document = self.split[number]
            check_pictures(document)
        # Whatever a decoder of untrusted pictures may raise.
        except Exception as error:
            return Unreadable(_sentence(error))
        return document


def check_pictures(given: Any) -> None:
    """Decode every picture in nested lists and mappings.

    Raises ValueError for an animated one, and what its decoder raises for one that is broken.
    """
    for picture in _pictures(given):
        # Photos of many cameras hold a preview beside the picture, which Pillow counts as a frame.
        if getattr(picture, "is_animated", False) and getattr(picture, "format", None) != "MPO":
            raise ValueError(f"an animated picture of {picture.n_frames} frames, want one frame or a video")
        picture.load()


def _pictures(given: Any) -> Iterator[Any]:
    if isinstance(given, Mapping):
        given = list(given.values())
    if isinstance(given, (list, tuple)):
        for part in given:
            yield from _pictures(part)
    elif hasattr(given, "load") and hasattr(given, "size"):
        yield given


def _sentence(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def _given(give: Callable[[Any], Any], document: Any) -> Any:
    """What a task gives of a document, or `Unreadable`; a mistake of the task's own is raised."""
    try:
        given = give(document)
    except Exception as error:
        if not type(error).__module__.startswith("PIL"):
            raise
        return Unreadable(_sentence(error))
    if isinstance(given, (list, tuple)) and any(part is None for part in given):
        return Unreadable("there is none")
    try:
        check_pictures(given)
    except Exception as error:
        return Unreadable(_sentence(error))
    return given


def answer_readable(
    lm: Any, requests: list[Any], answer: Callable[[list[Any]], list[Any]], unanswered: Any, tell: Callable[[str], None]
) -> list[Any]:
    """Answer requests with `answer`, those with unreadable pictures with `unanswered`.

    lm: lmms-eval's model, whose documents are guarded meanwhile. tell: gets a sentence on each question
    that was not answered, and one on all.
    """
    documents, reasons = lm.task_dict, {}
    asked: tuple[Any, ...] = ()

    def ask(*place: Any) -> None:
        nonlocal asked
        asked = place

    def guard(request: Any) -> Any:
        arguments = list(request.args)
        # The simple form gives pictures, the chat form messages, one place before.
        at = 2 if callable(arguments[2]) else 1
        give, nothing = arguments[at], NOTHING if at == 1 else []

        def visuals(document: Any) -> Any:
            given = document if isinstance(document, Unreadable) else _given(give, document)
            if not isinstance(given, Unreadable):
                return given
            # Models may call one request's function for a whole batch: the document last asked for is meant.
            reasons[asked] = given.reason
            return deepcopy(nothing)

        arguments[at] = visuals
        return replace(request, arguments=tuple(arguments))

    lm.task_dict = {
        task: {name: Documents(split, partial(ask, task, name)) for name, split in splits.items()}
        for task, splits in documents.items()
    }
    try:
        answers = answer([guard(request) for request in requests])
    finally:
        lm.task_dict = documents
    left_out = 0
    for number, request in enumerate(requests):
        *_, document, task, split = request.args
        if (reason := reasons.get((task, split, document))) is not None:
            tell(f"task {task}, question {document}: not answered, its picture is unreadable ({reason})")
            answers[number] = unanswered
            left_out += 1
    if left_out:
        tell(f"{left_out} of {len(requests)} questions were not answered, their pictures are unreadable")
    return answers
