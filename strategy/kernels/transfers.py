"""Copies between the host and a GPU, for which the host waits as seldom as possible.

A copy to the host waits for all that the GPU was given before, such as a vision tower; meanwhile, nothing new is given.
"""

from collections.abc import MutableMapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

# Copies on the host of tensors on GPUs, with the versions that they are of.
_known: MutableMapping[Tensor, tuple[int, Tensor]] = WeakTensorKeyDictionary()


def host_copy(tensor: Tensor) -> Tensor:
    """Return a tensor on the CPU; of one that has not changed since the last time, the same copy without waiting."""
    if tensor.device.type == "cpu":
        return tensor
    if tensor.is_inference():  # it does not count its changes
        return tensor.cpu()
    version, copy = _known.get(tensor, (None, tensor))
    if version != tensor._version:
        copy = tensor.cpu()
        _known[tensor] = tensor._version, copy
    return copy


def pinned(tensor: Tensor) -> Tensor:
    """Return a tensor of the CPU in memory that a GPU copies from by itself, if GPUs are used."""
    return tensor.pin_memory() if torch.cuda.is_initialized() else tensor


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """Return a tensor on a device; the host does not wait for one of its own, and `host_copy` knows it there."""
    if device.type == "cpu" or tensor.device.type != "cpu":
        return tensor.to(device)
    moved = pinned(tensor).to(device, non_blocking=True)
    if not moved.is_inference():
        _known[moved] = moved._version, tensor
    return moved


def tensor_on(device: torch.device, values: Sequence[Any], dtype: torch.dtype | None = None) -> Tensor:
    """Return a tensor of numbers on a device, without waiting for it."""
    return to_device(torch.tensor(values, dtype=dtype), device)
