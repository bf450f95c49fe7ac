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

from strategy.kernels.trial import is_half_on_gpu, launches

WIDEST_FLASH = 256  # width of a head
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
    lengths = [stop - start for start, stop in pairwise(bounds)]
    if _flash_takes(query):
        longest, on_device = max(lengths), _bounds_on(query.device, bounds)
        bounded = (on_device, on_device, longest, longest)  # queries, and keys
        with torch.cuda.device(query.device):
            seen = varlen_attn(query, key, value, *bounded, scale=scale, window_size=CAUSAL, **SHARED_KEYS)
        assert isinstance(seen, Tensor)
        return seen.contiguous()  # it lies in memory as the queries do
    attend = partial(F.scaled_dot_product_attention, is_causal=True, scale=scale, enable_gqa=True)
    pieces = zip(*(tensor.transpose(0, 1)[None].split(lengths, dim=2) for tensor in (query, key, value)), strict=True)
    return torch.cat([attend(*piece)[0].transpose(0, 1) for piece in pieces])


@packed_causal_attention.register_fake
def _(query: Tensor, key: Tensor, value: Tensor, ends: Tensor, scale: float) -> Tensor:
    return query.new_empty(query.shape)


def _flash_takes(query: Tensor) -> bool:
    """Return whether torch's flash attention takes queries: of half precision, on a GPU since Ampere, not too wide."""
    width = query.shape[2]
    if not is_half_on_gpu(query) or torch.version.hip or not torch.backends.cuda.is_flash_attention_available():
        return False
    return torch.cuda.get_device_capability(query.device) >= (8, 0) and width % 8 == 0 and width <= WIDEST_FLASH


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

    return launches(device, trial, "vision towers attend by torch's kernels")


def _bounds_on(device: torch.device, bounds: Sequence[int]) -> Any:
    """Return bounds as int32 on a device, those that are kept if there are any."""
    kept, key = _kept_bounds.get(), (device, *bounds)
    if kept is None:
        kept = {}
    if key not in kept:
        kept[key] = torch.tensor(bounds, dtype=torch.int32).to(device, non_blocking=True)
    return kept[key]
