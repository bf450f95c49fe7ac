"""Whether a Triton kernel takes a tensor, and can be built and launched, by a trial."""

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


def launches(device: torch.device, trial: Callable[[], Any], instead: str) -> bool:
    """Return whether a Triton kernel can be built and launched on a device; warn if a trial fails.

    Args:
        device: The device; no kernel is for AMD's, nor for GPUs before Ampere.
        trial: Launches the kernel with little to do.
        instead: Who computes without the kernel, such as "vision towers attend by torch's kernels".
    """
    if torch.version.hip or (device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 0)):
        return False
    try:
        with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
            trial()
    except torch.cuda.OutOfMemoryError:
        raise
    except Exception as error:  # of many kinds: Triton, its tools and the C compiler raise them
        reason = first_line(error)
        warnings.warn(f"{instead}, since that of Triton cannot be launched ({reason})", stacklevel=3)
        return False
    return True
