"""Attention rows of one layer, recomputed for a few queries from what the layer left behind."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from strategy.kernels.compile import compilable
from strategy.kernels.layer_spec import MISDESCRIBED, LayerSpec, part

MAX_ATTENTION = 1 << 24  # numbers of an attention matrix that are held at once, 64 MiB


def gather_rows(tensor: Tensor, index: Tensor) -> Tensor:
    """Pick rows [B, R] out of [B or 1, L, ...] along the second dimension."""
    # `take_along_dim` would spread the index over all dimensions that follow.
    if len(tensor) == 1:
        return tensor[0][index]
    return tensor[torch.arange(len(index), device=index.device)[:, None], index]


@compilable
def attention_to(weights: Tensor, visual: Tensor) -> Tensor:
    """Pick from attention [G, heads, R, L] the part that the tokens at `visual` [G, N] receive."""
    return weights.gather(3, visual[:, None, None].expand(-1, *weights.shape[1:3], -1))


def apply_rotary(head: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the first part of heads [B, heads, L, width] by cosines and sines [B or 1, L, width of that part]."""
    turned, still = head[..., : cos.shape[-1]], head[..., cos.shape[-1] :]
    first, second = turned.chunk(2, dim=-1)
    turned = turned * cos[:, None] + torch.cat((-second, first), dim=-1) * sin[:, None]
    return torch.cat((turned, still), dim=-1) if still.shape[-1] else turned


def received_attention(query: Tensor, key: Tensor) -> Tensor:
    """Compute what tokens that all see each other pay each of them, in sum over the queries.

    Args:
        query: [P, R, heads, width], of those that count.
        key: [P, L, heads, width], of all.

    Returns:
        Float32 [P, L, heads].
    """
    pieces, length, heads, width = key.shape
    rows = max(1, MAX_ATTENTION // (pieces * heads * length))
    key = key.float() * width**-0.5
    sums = [
        torch.einsum("prhd,plhd->phrl", some.float(), key).softmax(dim=-1).sum(2) for some in query.split(rows, dim=1)
    ]
    return torch.stack(sums).sum(0).transpose(1, 2)


def _project(layer: nn.Module, spec: LayerSpec, path: str | None, norm: str | None, x: Tensor) -> Tensor:
    """Project x [B, R, C] with a layer's own weights into heads [B, heads, R, head width]."""
    width = spec.head_width * (2 if spec.query_gate and path == spec.query else 1)
    head = part(layer, path)(part(layer, spec.input_norm)(x)).unflatten(-1, (-1, width))[..., : spec.head_width]
    return (head if norm is None else part(layer, norm)(head)).transpose(1, 2)


def project_keys(layer: nn.Module, spec: LayerSpec, hidden: Tensor, rotary: tuple[Tensor, Tensor]) -> Tensor:
    """Compute the rotated keys [B, key heads, L, head width] of a layer from its input [B, L, C]."""
    return apply_rotary(_project(layer, spec, spec.key, spec.key_norm, hidden), *rotary)


def check_rows(layer: nn.Module, spec: LayerSpec, stages: Sequence[int] = ()) -> None:
    """Raise ValueError for a layer whose attention or keys are other ones than `attention_rows` computes.

    Args:
        layer: The layer, with its description `spec`.
        stages: Where else to prune, for the error.
    """
    if not spec.has_rows:
        where = f"at one of {list(stages)}" if stages else "behind another layer"
        name, ways = type(layer).__name__, f"prune {where}, or choose a strategy that uses no attention"
        if spec.attention == MISDESCRIBED:
            raise ValueError(
                f"a {name} caches other keys than the layer_spec and rotary of its backbone give, so attention rows "
                f"would be wrong: correct the two, {ways}"
            )
        raise ValueError(
            f"a {name} with {spec.attention} attention and rotary embedding {spec.rotary}: attention "
            f"rows are computed for full or window attention with rotary embedding half; {ways}"
        )


def attention_rows(
    layer: nn.Module,
    spec: LayerSpec,
    hidden: Tensor,
    query_positions: Tensor,
    rotary: tuple[Tensor, Tensor],
    keys: Tensor | None,
    mask: Any,
) -> Tensor:
    """Compute the attention that some tokens pay all tokens.

    Args:
        layer: The layer, with its description `spec`, for which `check_rows` raises nothing.
        hidden: The layer's input [B, L, C].
        query_positions: Sequence indices [B, R] of the tokens.
        rotary: Cosines and sines [B or 1, L, head width].
        keys: The layer's keys [B, key heads, L, head width] from the cache; None projects them again.
        mask: The layer's own attention mask: None, [B, L] or [B, 1, L, L], additive or boolean.

    Returns:
        Attention after the softmax, float32 [B, heads, R, L].
    """
    cos, sin = rotary
    queries = _project(layer, spec, spec.query, spec.query_norm, gather_rows(hidden, query_positions))
    queries = apply_rotary(queries, gather_rows(cos, query_positions), gather_rows(sin, query_positions))
    if keys is None:
        keys = project_keys(layer, spec, hidden, rotary)
    return softmax_rows(queries, keys, spec.scale, query_positions, mask)


def softmax_rows(queries: Tensor, keys: Tensor, scale: float, query_positions: Tensor, mask: Any) -> Tensor:
    """Compute the attention of some queries over all keys.

    Args:
        queries: [B, heads, R, head width], rotated.
        keys: [B, key heads, L, head width], rotated.
        scale: The factor of the logits.
        query_positions: Sequence indices [B, R] of the queries.
        mask: None, [B, L] or [B, 1, L, L], additive or boolean.

    Returns:
        Attention after the softmax, float32 [B, heads, R, L].
    """
    grouped = queries.float().unflatten(1, (keys.shape[1], -1))
    logits = torch.einsum("bkgrd,bkld->bkgrl", grouped, keys.float()).flatten(1, 2) * scale
    # Minus infinity would make NaN of the row of a token that sees nothing, one of the padding.
    lowest = torch.finfo(logits.dtype).min
    if mask is not None and mask.dim() == 4:
        mask = gather_rows(mask[:, 0], query_positions)[:, None]
        logits = logits.masked_fill(~mask, lowest) if mask.dtype == torch.bool else logits + mask.float()
    else:
        seen = torch.arange(keys.shape[2], device=keys.device) <= query_positions[:, :, None]
        if mask is not None:
            seen = seen & mask.bool()[:, None]
        logits = logits.masked_fill(~seen[:, None], lowest)
    return logits.softmax(dim=-1)
