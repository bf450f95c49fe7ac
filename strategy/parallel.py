"""Tensor parallelism: a decoder whose heads are split over several processes, which answer together.

DeepSpeed splits the layers and adds up what they give; here is what its ranks must tell each other besides.
"""

import atexit
import gc
from collections.abc import Sequence
from dataclasses import replace
from datetime import timedelta
from itertools import chain
from types import SimpleNamespace
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.distributed import ProcessGroup

from strategy import fused, ranks

# The projections whose results are sums over all ranks; all others of a layer give a rank its own share.
SUMMED = ("self_attn.o_proj", "mlp.down_proj")
LATER = 300.0  # seconds after `ranks.Watch`, which is to be first: torch ends a group that waits, and names nobody
# What calls a group, and has to `clear` before that ends.
USERS: WeakSet[Any] = WeakSet()
OWN = ...  # stands for what of a request does not travel


def read_ranks(given: Any) -> int:
    """How many processes `tensor_parallel` asks for; ValueError for what is no number, or does not fit the world."""
    if not str(given).isdecimal() or int(given) < 1:
        raise ValueError(f"tensor_parallel={given!r}: allowed is a whole number from 1 up")
    shares = int(given)
    if ranks.count() % shares:
        raise ValueError(
            f"tensor_parallel={shares}: want {shares} processes started together or a multiple of it, not "
            f"{ranks.count()}: `accelerate launch --num_processes {shares} -m lmms_eval`"
        )
    return shares


def split(model: nn.Module, decoder: Any, shares: int) -> ProcessGroup | None:
    """Leave of each layer of a model's decoder one rank's share, move the model to its device, and return the group.

    decoder: inside of the model or the model itself, whose weights lie on the CPU. Called by all processes that were
    started, with the same model; each `shares` of them, in order, become a group, and hold the model once. With one
    rank nothing is done, and the group is None. Raises ValueError where the heads or the processes cannot be split so,
    for a decoder that is split already, or without deepspeed.
    """
    if shares == 1:
        return None
    heads, keys = decoder.config.num_attention_heads, decoder.config.num_key_value_heads
    if heads % shares or keys % shares:
        fit = [n for n in range(1, keys + 1) if not (heads % n or keys % n)]
        here = [str(n) for n in fit if ranks.count() % n == 0]
        raise ValueError(
            f"tensor_parallel={shares}: {heads} attention heads and {keys} key heads can be split over "
            f"{', '.join(map(str, fit))} processes, and of these {', '.join(here)} fit the {ranks.count()} started"
        )
    if reason := fused.unfit(decoder.layers):
        raise ValueError(
            f"tensor_parallel={shares}: {reason} cannot be split; device_map=auto lays whole layers on several GPUs"
        )
    if fused.group_of(decoder.layers) is not None:
        raise ValueError(f"tensor_parallel={shares}: this {type(model).__name__} is split already")
    deepspeed = started(f"tensor_parallel={shares}")
    group, _ = dist.new_subgroups(shares, timeout=group_timeout())
    # It takes all to the type of the weights, also the rotary tables, which are finer.
    fine = {name: buffer.clone() for name, buffer in decoder.named_buffers()}
    deepspeed.init_inference(
        decoder,
        dtype=decoder.dtype,
        replace_with_kernel_inject=False,
        injection_policy={type(decoder.layers[0]): SUMMED},
        tensor_parallel={
            "tp_size": shares,
            "tp_group": group,
            "mpu": SimpleNamespace(get_model_parallel_group=lambda: group),
        },
    )
    for name, buffer in decoder.named_buffers():
        buffer.data = fine[name].to(buffer.device)
    model.to(ranks.take_device())
    decoder.register_forward_pre_hook(ranks.Watch(dist.get_process_group_ranks(group)).begin)
    return group


def started(asked: str) -> Any:
    """DeepSpeed, with all processes met and this one's GPU taken; ValueError without it, which names what was asked."""
    try:
        import deepspeed  # noqa: PLC0415  an extra, and it takes seconds
    except ImportError:
        raise ValueError(f"{asked} needs deepspeed: install the extra `scale`") from None
    ranks.take_device()
    # Its own sum for CPUs is over all processes, whatever the group, and is compiled at its first use.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(timeout=group_timeout())
    # A process that ends with a group's threads running is now and then aborted.
    atexit.register(leave)
    return deepspeed


def group_timeout() -> timedelta:
    """How long a rank may wait for others in a collective; ValueError as in `ranks.longest_wait`."""
    return timedelta(seconds=ranks.longest_wait() + LATER)


def leave() -> None:
    """End all groups of this process, if there are any, and the threads of those that only the model still holds."""
    for user in list(USERS):
        user.clear()
    if dist.is_initialized():
        dist.destroy_process_group()
        gc.collect()


def is_first(group: ProcessGroup | None) -> bool:
    """Whether this is the one rank of a group that speaks for all; without a group each does for itself."""
    return group is None or group.rank() == 0


def heads_of_all(own: Tensor, group: ProcessGroup | None) -> Tensor:
    """Of each rank's own heads [G, heads, ...] those of all ranks of a group, in order; without one, as they are."""
    if group is None:
        return own
    everyone = own.new_empty(group.size() * len(own), *own.shape[1:])
    dist.all_gather_into_tensor(everyone, own.contiguous(), group=group)
    return everyone.unflatten(0, (group.size(), len(own))).movedim(0, 1).flatten(1, 2)


def of_first(own: Tensor, group: ProcessGroup | None) -> Tensor:
    """What the first rank of a group has in the place of one's own tensor; without a group, as it is.

    own: of the same shape and type on all ranks; it may be written to. All ranks compute the same; but kernels that are
    tuned while they run may round otherwise in each.
    """
    if group is None:
        return own
    own = own.contiguous()
    dist.broadcast(own, dist.get_global_rank(group, 0), group=group)
    return own


def least_of_all(own: Sequence[int], device: torch.device, group: ProcessGroup | None) -> list[int]:
    """Of each of several whole numbers the smallest that a rank of a group has, for all to decide by.

    Waits for the device and for the other ranks, which bring as many numbers.
    """
    if group is None:
        return list(own)
    told = torch.tensor(own, device=device)
    dist.all_reduce(told, dist.ReduceOp.MIN, group=group)
    return told.tolist()


def pooled(requests: Sequence[Any], group: ProcessGroup | None) -> tuple[list[Any], slice]:
    """The requests that lmms-eval makes to the ranks of a group, all of them on every rank, and which are one's own.

    Called by all ranks of the group. The functions in a request are those of its task, and each rank takes its own.
    Raises ValueError, on all ranks, for a task of which some ranks were given no question.
    """
    if group is None:
        return list(requests), slice(None)
    own = {request.task_name: request for request in requests}
    told = [
        (request.task_name, ranks.fills(request), [OWN if callable(part) else part for part in request.args])
        for request in requests
    ]
    everyone: list[Any] = [None] * group.size()
    dist.all_gather_object(everyone, told, group=group)
    tasks = [{task for task, *_ in each} for each in everyone]
    if short := set().union(*tasks) - set.intersection(*tasks):
        raise ValueError(
            f"task {', '.join(map(repr, sorted(short)))} has fewer questions than there are processes "
            f"({ranks.count()}), and lmms-eval filled none up: start fewer"
        )
    before = sum(map(len, everyone[: group.rank()]))
    whole = []
    for task, fills, parts in chain.from_iterable(everyone):
        mine = own[task]
        given = (its if part is OWN else part for part, its in zip(parts, mine.args, strict=True))
        whole.append(replace(mine, arguments=tuple(given), metadata=mine.metadata | {ranks.FILLS: fills}))
    return whole, slice(before, before + len(told))
