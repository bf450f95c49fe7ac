"""Whether a Triton kernel can be built and launched, by a trial."""

import warnings
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch

from strategy.kernels.errors import first_line


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
