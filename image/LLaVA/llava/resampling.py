"""Pillow's bicubic resampling of square pictures on any device, bit for bit, since its arithmetic is that of integers.

Which sides of other pictures come first differs between versions of Pillow.
"""

import math
from functools import lru_cache

import torch
from torch import Tensor

SUPPORT = 2.0  # pixels to each side that a bicubic filter reads, where a picture is not made smaller
BITS = 22  # of the weights behind the point


def resize(colours: Tensor, side: int) -> Tensor:
    """Resize square pictures [..., N, N] uint8 to [..., side, side]."""
    if colours.shape[-1] == side:
        return colours
    return _resample(_resample(colours, side).mT, side).mT


def _resample(colours: Tensor, size: int) -> Tensor:
    """Resample the last dimension of bytes [..., N] to [..., size]."""
    places, weights = _taps(colours.shape[-1], size, colours.device)
    sums = (colours[..., places] * weights).sum(-1, dtype=torch.int32)
    return ((sums + (1 << BITS - 1)) >> BITS).clamp(0, 255).to(torch.uint8)


@lru_cache(maxsize=64)
def _taps(length: int, size: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return the places [size, T] of the pixels that make each new one, and their weights, int32 of BITS.

    Source: the coefficients of Pillow's `Resample.c`, for bytes.
    """
    scale = length / size
    stretch = max(scale, 1.0)
    support = SUPPORT * stretch
    centre = (torch.arange(size, dtype=torch.float64)[:, None] + 0.5) * scale
    first = (centre - support + 0.5).trunc().clamp(min=0)
    places = first + torch.arange(math.ceil(support) * 2 + 1)
    real = places < (centre + support + 0.5).trunc().clamp(max=length)
    shares = torch.where(real, _bicubic((places - centre + 0.5) * (1 / stretch)), 0)
    total = torch.zeros_like(centre)
    for share in shares.split(1, dim=1):  # in order, as sums of another order round otherwise
        total = total + share
    weights = (shares / total * (1 << BITS) + shares.sign() * 0.5).trunc()
    return torch.where(real, places, 0).long().to(device), weights.to(device, torch.int32)


def _bicubic(x: Tensor) -> Tensor:
    """Return the weight of a pixel so far away, with the parameter -0.5."""
    x = x.abs()
    near, far = (1.5 * x - 2.5) * x * x + 1, (((x - 5) * x + 8) * x - 4) * -0.5
    return torch.where(x < 1, near, torch.where(x < 2, far, 0))
