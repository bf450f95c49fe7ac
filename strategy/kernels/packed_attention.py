"""Attention inside the pieces of a packed sequence: pictures, frames or windows in a vision tower, or whole prompts."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache, partial
from inspect import signature
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention.varlen import varlen_attn
from torch.utils.flop_counter import register_flop_formula

from strategy.kernels.trial import is_half_on_gpu, passes

CAUSAL = (-1, 0)  # how many tokens before and behind its own a token sees; -1 is all of them
# Since torch 2.13 flash attention wants to be asked to share a key head among queries; before, it does so unasked.
SHARED_KEYS: dict[str, Any] = {"enable_gqa": True} if "enable_gqa" in signature(varlen_attn).parameters else {}
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
        with torch.cuda.device(query.device):
            return _triton().attend(query, key, value, _bounds_on(query.device, bounds), max(lengths))
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


@torch.library.custom_op("vtr::packed_causal_attention", mutates_args=())
def packed_causal_attention(query: Tensor, key: Tensor, value: Tensor, ends: Tensor, scale: float) -> Tensor:
    """Compute attention of tokens that see those before them inside pieces.

    Args:
        query: [L, heads, head width].
        key, value: [L, key heads, head width].
        ends: As for `packed_attention`.
        scale: By which logits are multiplied.

    Returns:
        [L, heads, head width].
    """
    bounds = ends.tolist()
    if is_half_on_gpu(query) and flash_agrees(query.device, query.dtype, query.shape[2], query.shape[1], key.shape[1]):
        return _attend_by_flash(query, key, value, bounds, scale)
    return _attend_one_by_one(query, key, value, bounds, scale)


@packed_causal_attention.register_fake
def _(query: Tensor, key: Tensor, value: Tensor, ends: Tensor, scale: float) -> Tensor:
    return query.new_empty(query.shape)


def _attend_by_flash(query: Tensor, key: Tensor, value: Tensor, bounds: Sequence[int], scale: float) -> Tensor:
    longest, ends = max(stop - start for start, stop in pairwise(bounds)), _bounds_on(query.device, bounds)
    seen = varlen_attn(query, key, value, ends, ends, longest, longest, scale=scale, window_size=CAUSAL, **SHARED_KEYS)
    assert isinstance(seen, Tensor)
    return seen.contiguous()  # it lies in memory as the queries do


def _attend_one_by_one(query: Tensor, key: Tensor, value: Tensor, bounds: Sequence[int], scale: float) -> Tensor:
    lengths = [stop - start for start, stop in pairwise(bounds)]
    attend = partial(F.scaled_dot_product_attention, is_causal=True, scale=scale, enable_gqa=True)
    pieces = zip(*(tensor.transpose(0, 1)[None].split(lengths, dim=2) for tensor in (query, key, value)), strict=True)
    return torch.cat([attend(*piece)[0].transpose(0, 1) for piece in pieces])


@cache
def flash_agrees(device: torch.device, dtype: torch.dtype, width: int, heads: int, key_heads: int) -> bool:
    """Return whether flash attention computes what is computed prompt by prompt, by a trial with two; warn if not.

    Args:
        device, dtype, width: Of queries.
        heads, key_heads: How many of queries, and of keys and values, there are.
    """

    def trial() -> None:
        def numbers(factor: int, heads: int) -> Tensor:
            count = torch.arange(70 * heads * width, device=device, dtype=torch.float32)
            return (factor * count).sin().to(dtype).view(70, heads, width)

        query, key, value = numbers(1, heads), numbers(2, key_heads), numbers(3, key_heads)
        ways = (_attend_by_flash, _attend_one_by_one)
        seen, expected = (attend(query, key, value, [0, 3, 70], width**-0.5) for attend in ways)
        torch.testing.assert_close(seen, expected, rtol=0.02, atol=0.02)

    return passes(device, trial, "packed prompts are attended to one by one")


def _attend_alike(query: Tensor, key: Tensor, value: Tensor, length: int) -> Tensor:
    """Compute attention [L, heads, head width] inside pieces of one length."""
    batched = [tensor.unflatten(0, (-1, length)).transpose(1, 2) for tensor in (query, key, value)]
    return F.scaled_dot_product_attention(*batched).transpose(1, 2).flatten(0, 1).contiguous()


def _kernel_takes(query: Tensor) -> bool:
    """Return whether the Triton kernel takes the queries: of half precision, on a GPU since Ampere."""
    return is_half_on_gpu(query) and can_launch(query.device, query.dtype, query.shape[2])


def _triton() -> Any:
    from strategy.kernels import packed_triton  # noqa: PLC0415, Triton is installed beside torch for GPUs only

    return packed_triton


@cache
def can_launch(device: torch.device, dtype: torch.dtype, width: int) -> bool:
    """Return whether the Triton kernel can be built and launched, by a trial with one token; warn if it fails."""

    def trial() -> None:
        token = torch.zeros(1, 16, width, dtype=dtype, device=device)
        # As many tokens as need several blocks, since Triton compiles anew for the number 1.
        _triton().attend(token, token, token, torch.tensor([0, 1], dtype=torch.int32, device=device), 1000)

    return passes(device, trial, "vision towers attend by torch's kernels")


def _bounds_on(device: torch.device, bounds: Sequence[int]) -> Any:
    """Return bounds as int32 on a device, those that are kept if there are any."""
    kept, key = _kept_bounds.get(), (device, *bounds)
    if kept is None:
        kept = {}
    if key not in kept:
        kept[key] = torch.tensor(bounds, dtype=torch.int32).to(device, non_blocking=True)
    return kept[key]
