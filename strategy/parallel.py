"""Tensor parallelism: a decoder whose heads are split over several processes, which answer together.

DeepSpeed splits the layers and adds up what they give; here is what its ranks must tell each other besides.
"""

import atexit
import os
from collections.abc import Sequence
from dataclasses import replace
from itertools import chain
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.distributed import ProcessGroup

# The projections whose results are sums over all ranks; all others of a layer give a rank its own share.
SUMMED = ("self_attn.o_proj", "mlp.down_proj")
OWN = ...  # stands for what of a request does not travel


def world_size() -> int:
    """How many processes were started together."""
    return dist.get_world_size() if dist.is_initialized() else int(os.environ.get("WORLD_SIZE", "1"))


def read_ranks(given: Any) -> int:
    """The number of ranks that `tensor_parallel` asks for; ValueError for what is none, or does not fit the world."""
    if not str(given).isdecimal() or int(given) < 1:
        raise ValueError(f"tensor_parallel={given!r}: allowed is a whole number from 1 up")
    ranks = int(given)
    if world_size() % ranks:
        launchers = (
            f"python -m torch.distributed.run --nproc_per_node {ranks} -m lmms_eval",
            f"deepspeed --num_gpus {ranks} --no_local_rank --module lmms_eval",
        )
        raise ValueError(
            f"tensor_parallel={ranks}: want {ranks} processes started together or a multiple of it, not {world_size()}:"
            f" `{'` or `'.join(launchers)}`"
        )
    return ranks


def own_device() -> torch.device:
    """Where a process puts its share of a model: the GPU of its number on this host, or the CPU."""
    gpus = torch.cuda.is_available()
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0"))) if gpus else torch.device("cpu")


def split(model: nn.Module, decoder: Any, ranks: int) -> ProcessGroup | None:
    """Leave of each layer of a model's decoder one rank's share, move the model to `own_device`, and return the group.

    decoder: inside of the model or the model itself, whose weights lie on the CPU. Called by all processes that were
    started, with the same model; each `ranks` of them, in order, become a group, and hold the model once. With one
    rank nothing is done, and the group is None. Raises ValueError where the heads or the processes cannot be split so,
    or without deepspeed.
    """
    if ranks == 1:
        return None
    heads, keys = decoder.config.num_attention_heads, decoder.config.num_key_value_heads
    if heads % ranks or keys % ranks:
        fit = [n for n in range(1, keys + 1) if not (heads % n or keys % n)]
        here = [str(n) for n in fit if world_size() % n == 0]
        raise ValueError(
            f"tensor_parallel={ranks}: {heads} attention heads and {keys} key heads can be split over "
            f"{', '.join(map(str, fit))} processes, and of these {', '.join(here)} fit the {world_size()} started"
        )
    try:
        import deepspeed  # noqa: PLC0415  an extra, and it takes seconds
    except ImportError:
        raise ValueError(f"tensor_parallel={ranks} needs deepspeed: install the extra `scale`") from None
    if own_device().type == "cuda":
        torch.cuda.set_device(own_device())
    # Its own sum for CPUs is over all processes, whatever the group, and is compiled at its first use.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed()
    # A process that ends with a group's threads running is now and then aborted.
    atexit.register(leave)
    group, _ = dist.new_subgroups(ranks)
    # It takes all to the type of the weights, also the rotary tables, which are finer.
    fine = {name: buffer.clone() for name, buffer in decoder.named_buffers()}
    deepspeed.init_inference(
        decoder,
        dtype=decoder.dtype,
        replace_with_kernel_inject=False,
        injection_policy={type(decoder.layers[0]): SUMMED},
        tensor_parallel={
            "tp_size": ranks,
            "tp_group": group,
            "mpu": SimpleNamespace(get_model_parallel_group=lambda: group),
        },
    )
    for name, buffer in decoder.named_buffers():
        buffer.data = fine[name].to(buffer.device)
    model.to(own_device())
    return group


def leave() -> None:
    """End all groups of this process, if there are any."""
    if dist.is_initialized():
        dist.destroy_process_group()


def heads_of_all(own: Tensor, group: ProcessGroup | None) -> Tensor:
    """Of each rank's own heads [G, heads, ...] those of all ranks of a group, in order; without one, as they are."""
    if group is None:
        return own
    everyone = own.new_empty(group.size() * len(own), *own.shape[1:])
    dist.all_gather_into_tensor(everyone, own.contiguous(), group=group)
    return everyone.unflatten(0, (group.size(), len(own))).movedim(0, 1).flatten(1, 2)


def pooled(requests: Sequence[Any], group: ProcessGroup | None) -> tuple[list[Any], slice]:
    """The requests that lmms-eval makes to the ranks of a group, all of them on every rank, and which are one's own.

    Called by all ranks of the group. The functions in a request are those of its task, and each rank takes its own.
    Raises ValueError, on all ranks, for a task of which some ranks were given no question.
    """
    if group is None:
        return list(requests), slice(None)
    own = {request.task_name: request for request in requests}
    told = [(request.task_name, [OWN if callable(part) else part for part in request.args]) for request in requests]
    everyone: list[Any] = [None] * group.size()
    dist.all_gather_object(everyone, told, group=group)
    tasks = [{task for task, _ in each} for each in everyone]
    if short := set().union(*tasks) - set.intersection(*tasks):
        raise ValueError(
            f"task {', '.join(map(repr, sorted(short)))} has fewer questions than there are processes "
            f"({world_size()}): raise --limit, or start fewer"
        )
    before = sum(map(len, everyone[: group.rank()]))
    whole = []
    for task, parts in chain.from_iterable(everyone):
        mine = own[task].args
        given = (its if part is OWN else part for part, its in zip(parts, mine, strict=True))
        whole.append(replace(own[task], arguments=tuple(given)))
    return whole, slice(before, before + len(told))
