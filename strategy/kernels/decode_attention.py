"""Attention of one token a sample over a cache of fixed size."""

from functools import cache
from typing import Any

import torch
from torch import Tensor

from strategy.kernels.trial import is_half_on_gpu, passes


# An operation of its own is opaque to torch.compile, which otherwise decides about the layout of what the kernel reads.
@torch.library.custom_op("vtr::decode_attention", mutates_args=())
def decode_attention(query: Tensor, keys: Tensor, values: Tensor, slot: Tensor, scale: float) -> Tensor:
    """Compute the attention of one token a sample by a kernel that reads no slot behind the token's own.

    Args:
        query: [B, key heads, queries of a key head, width], of half precision, on a GPU.
        keys, values: The cache's, [B, key heads, slots, width], contiguous.
        slot: The token's slot, integers [B], contiguous.
        scale: By which logits are multiplied.

    Returns:
        [B, key heads, queries of a key head, width].
    """
    with torch.cuda.device(query.device):
        return _triton().attend(query.contiguous(), keys, values, slot, scale)


@decode_attention.register_fake
def _(query: Tensor, keys: Tensor, values: Tensor, slot: Tensor, scale: float) -> Tensor:
    return query.new_empty(query.shape)


def kernel_takes(keys: Tensor, shared_by: int) -> bool:
    """Return whether the kernel takes a cache's keys, of half precision and on a GPU.

    Args:
        keys: [B, key heads, slots, width].
        shared_by: Queries of a key head.
    """
    return is_half_on_gpu(keys) and can_launch(keys.device, keys.dtype, keys.shape[3], shared_by)


@cache
def can_launch(device: torch.device, dtype: torch.dtype, width: int, shared_by: int) -> bool:
    """Return whether the kernel can be built and launched, by a trial with a short cache; warn if it fails."""

    def trial() -> None:
        # As many heads as need no code of their own, which Triton compiles for the number 1.
        token, cache = (torch.zeros(1, 2, length, width, dtype=dtype, device=device) for length in (shared_by, 64))
        _triton().attend(token, cache, cache, torch.zeros(1, dtype=torch.int64, device=device), 1.0)

    return passes(device, trial, "decode steps attend by torch's kernels")


def _triton() -> Any:
    from strategy.kernels import decode_triton  # noqa: PLC0415, Triton is installed beside torch for GPUs only

    return decode_triton
