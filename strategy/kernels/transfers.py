"""Copies between the host and a GPU, for which the host waits as seldom as possible.

A copy to the host waits for all that the GPU was given before, such as a vision tower; meanwhile, nothing new is given.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, NamedTuple

import torch
from torch import Tensor


class _Known(NamedTuple):
    """A tensor on a GPU, its version, and what it holds, on the CPU."""

    tensor: Tensor
    version: int
    copy: Tensor


_known: ContextVar[dict[int, _Known] | None] = ContextVar("known", default=None)


@contextmanager
def remembering() -> Iterator[None]:
    """Let `host_copy` remember its copies inside the outermost of such `with`, of one thread."""
    token = _known.set({}) if _known.get() is None else None
    try:
        yield
    finally:
        if token is not None:
            _known.reset(token)


def host_copy(tensor: Tensor) -> Tensor:
    """Return a tensor on the CPU; inside `remembering`, the copy of a tensor that has not changed since the last one.

    Tensors of the inference mode are copied each time, since they do not count their changes.
    """
    if tensor.device.type == "cpu":
        return tensor
    known = _known.get()
    if known is None or tensor.is_inference():
        return tensor.cpu()
    version, found = tensor._version, known.get(id(tensor))
    if found is None or found.version != version:
        found = known[id(tensor)] = _Known(tensor, version, tensor.cpu())
    return found.copy


def read_early(tensor: Tensor) -> None:
    """Copy a tensor to the host while the GPU has nothing to do, if the copy is remembered."""
    if _known.get() is not None:
        host_copy(tensor)


def pinned(tensor: Tensor) -> Tensor:
    """Return a tensor of the CPU in memory that a GPU copies from by itself, if GPUs are used; others as they are."""
    if tensor.device.type != "cpu" or not torch.cuda.is_initialized() or tensor.is_pinned():
        return tensor
    # `pin_memory` keeps strides, and fails for an expanded tensor, whose elements share memory.
    return torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu", pin_memory=True).copy_(tensor)


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """Return a tensor on a device; the host does not wait for one of its own, and `host_copy` may know it there."""
    if device.type == "cpu" or tensor.device.type != "cpu":
        return tensor.to(device)
    moved, known = pinned(tensor).to(device, non_blocking=True), _known.get()
    if known is not None and not moved.is_inference():
        known[id(moved)] = _Known(moved, moved._version, tensor)
    return moved


def tensor_on(device: torch.device, values: Sequence[Any], dtype: torch.dtype | None = None) -> Tensor:
    """Return a tensor of numbers on a device, without waiting for it."""
    return to_device(torch.tensor(values, dtype=dtype, device="cpu"), device)
