"""Attention inside the pieces of a packed sequence: the pictures of a vision tower's call, their frames, or windows."""

import importlib.util
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.flop_counter import register_flop_formula

_kept_bounds: ContextVar[dict[Any, Any] | None] = ContextVar("kept_bounds", default=None)


@contextmanager
def keeping_bounds(kept: dict[Any, Any]) -> Iterator[None]:
    """Keep in `kept` what is copied to the GPU inside this `with`, for a CUDA graph, which can copy nothing."""
    token = _kept_bounds.set(kept)
    try:
        yield
    finally:
        _kept_bounds.reset(token)


# An operation of its own is opaque to torch.compile, which would compile anew for other numbers of pieces.
@torch.library.custom_op("vtr::packed_attention", mutates_args=())
def packed_attention(query: Tensor, key: Tensor, value: Tensor, ends: Tensor) -> Tensor:
    """Compute attention of tokens that see each other inside pieces.

    Args:
        query, key, value: [L, heads, head width]; logits are divided by the square root of the width.
        ends: Integers [pieces + 1], where pieces begin and the last one ends; the host reads them.

    Returns:
        [L, heads, head width].
    """
    bounds = ends.tolist()
    lengths = [stop - start for start, stop in pairwise(bounds)]
    if _kernel_takes(query):
        from strategy.kernels import packed_triton  # noqa: PLC0415, it is installed beside torch for GPUs only

        with torch.cuda.device(query.device):
            return packed_triton.attend(query, key, value, _bounds_on(query.device, bounds), max(lengths))
    if len({*lengths}) == 1:
        return _attend_alike(query, key, value, lengths[0])
    pieces = [tensor.split(lengths) for tensor in (query, key, value)]
    return torch.cat([_attend_alike(*piece) for piece in zip(*pieces, lengths, strict=True)])


@packed_attention.register_fake
def _(query: Tensor, key: Tensor, value: Tensor, ends: Tensor) -> Tensor:
    return query.new_empty(query.shape)


@register_flop_formula(torch.ops.vtr.packed_attention, get_raw=True)
def _flops(query: Tensor, key: Tensor, value: Tensor, ends: Tensor, **_: Any) -> int:
    pairs = sum(length**2 for length in ends.diff().tolist())
    return 4 * pairs * query.shape[1] * query.shape[2]


def _attend_alike(query: Tensor, key: Tensor, value: Tensor, length: int) -> Tensor:
    """Compute attention [L, heads, head width] inside pieces of one length."""
    batched = [tensor.unflatten(0, (-1, length)).transpose(1, 2) for tensor in (query, key, value)]
    return F.scaled_dot_product_attention(*batched).transpose(1, 2).flatten(0, 1).contiguous()


def _kernel_takes(query: Tensor) -> bool:
    """Return whether the Triton kernel takes the queries: of half precision, on a GPU since Ampere."""
    half = query.dtype in (torch.float16, torch.bfloat16)
    return query.is_cuda and half and _has_triton() and torch.cuda.get_device_capability(query.device) >= (8, 0)


@cache
def _has_triton() -> bool:
    return torch.version.hip is None and importlib.util.find_spec("triton") is not None


def _bounds_on(device: torch.device, bounds: Sequence[int]) -> Tensor:
    kept = _kept_bounds.get()
    key = (device, *bounds)
    if kept is not None and key in kept:
        return kept[key]
    tensor = torch.tensor(bounds, dtype=torch.int32).to(device, non_blocking=True)
    if kept is not None:
        kept[key] = tensor
    return tensor
