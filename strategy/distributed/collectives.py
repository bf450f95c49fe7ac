"""What the processes of a run, or those that share a model, exchange."""

import gc
import itertools
import json
from collections.abc import Sequence
from datetime import timedelta
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor
from torch import distributed as dist
from torch.distributed import ProcessGroup

from strategy.distributed import processes, watchdog
from strategy.distributed.processes import rank, world_size

# Seconds after the watchdog's timeout: torch ends a group that waits too long without naming the missing rank, so the
# watchdog has to be first.
GROUP_TIMEOUT_MARGIN = 300.0
_gathers = itertools.count()
_graph_owners: WeakSet[Any] = WeakSet()


def gather(own: Any) -> list[Any]:
    """Return what every rank passed to its n-th call of this function, in the order of ranks, exchanged as JSON.

    If ranks are missing and none of them progresses for `rank_timeout()` seconds, the run stops and names them.
    """
    if world_size() == 1:
        return [own]
    store, number = processes.store(), next(_gathers)
    keys = [f"gather {number} of {other}" for other in range(world_size())]
    store.set(keys[rank()], json.dumps(own))
    with watchdog.launcher_alive():
        watchdog.wait_until_none(lambda: [other for other, key in enumerate(keys) if not store.check([key])])
    return [json.loads(store.get(key)) for key in keys]


def group_timeout() -> timedelta:
    """Return how long a rank may wait for others in a collective; raises ValueError as `rank_timeout` does."""
    return timedelta(seconds=processes.rank_timeout() + GROUP_TIMEOUT_MARGIN)


def clear_before_shutdown(owner: Any) -> None:
    """Let `shutdown_process_groups` call `owner.clear()` first, for one whose CUDA graphs use a group."""
    _graph_owners.add(owner)


def shutdown_process_groups() -> None:
    """End all process groups of this process, with the threads of those that only the model still holds."""
    for owner in list(_graph_owners):
        owner.clear()
    if dist.is_initialized():
        dist.destroy_process_group()
        gc.collect()


def is_first_rank(group: ProcessGroup | None) -> bool:
    """Return whether this rank reports for its group; without a group each rank reports for itself."""
    return group is None or group.rank() == 0


def all_gather_heads(own: Tensor, group: ProcessGroup | None) -> Tensor:
    """Concatenate the heads [G, heads, ...] of all ranks of a group, in order; without a group, return `own`."""
    if group is None:
        return own
    everyone = own.new_empty(group.size() * len(own), *own.shape[1:])
    dist.all_gather_into_tensor(everyone, own.contiguous(), group=group)
    return everyone.unflatten(0, (group.size(), len(own))).movedim(0, 1).flatten(1, 2)


def broadcast_first(own: Tensor, group: ProcessGroup | None) -> Tensor:
    """Return the first rank's tensor on all ranks of a group; without a group, return `own`.

    All ranks compute the same values, but kernels that are tuned while they run may round differently on each rank.

    Args:
        own: This rank's tensor, of the same shape and type on all ranks. The result may overwrite it.
    """
    if group is None:
        return own
    own = own.contiguous()
    dist.broadcast(own, dist.get_global_rank(group, 0), group=group)
    return own


def all_reduce_min(own: Sequence[int], device: torch.device, group: ProcessGroup | None) -> list[int]:
    """Return the smallest value of each of several integers over all ranks of a group, so that all decide alike.

    The call waits for the device and for the other ranks, which pass as many integers.
    """
    if group is None:
        return list(own)
    values = torch.tensor(own, device=device)
    dist.all_reduce(values, dist.ReduceOp.MIN, group=group)
    return values.tolist()
