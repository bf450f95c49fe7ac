"""Whether a kernel takes a tensor, and works where it would run, by a trial."""

import warnings
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from strategy.kernels.errors import first_line


def is_half_on_gpu(tensor: Tensor) -> bool:
    """Return whether a tensor is of half precision and on a GPU, as the kernels want it."""
    return tensor.is_cuda and tensor.dtype in (torch.float16, torch.bfloat16)


def passes(device: torch.device, trial: Callable[[], Any], instead: str) -> bool:
    """Return whether a kernel works on a device; warn if its trial fails.

    Args:
        device: The device; no kernel is for AMD's, nor for GPUs before Ampere.
        trial: Has the kernel do little; raises an exception if that fails or comes out wrong.
        instead: Who computes without the kernel, such as "vision towers attend by torch's kernels".
    """
    if torch.version.hip or (device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 0)):
        return False
    try:
        with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
            trial()
    except torch.cuda.OutOfMemoryError:
        raise
    except Exception as error:  # of many kinds: torch, Triton, its tools and the C compiler raise them
        reason = first_line(error)
        warnings.warn(f"{instead}, since a faster kernel failed its trial ({reason})", stacklevel=3)
        return False
    return True
