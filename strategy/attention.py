"""Attention rows of one layer, recomputed for a few queries from what the layer left behind."""

from typing import Any

import torch
from torch import Tensor

from strategy.fusing import fusable


def rows_of(tensor: Tensor, index: Tensor) -> Tensor:
    """Pick rows [B, R] out of [B or 1, L, ...] along the second dimension."""
    # Not take_along_dim, which would spread the index over all that follows.
    if len(tensor) == 1:
        return tensor[0][index]
    return tensor[torch.arange(len(index), device=index.device)[:, None], index]


@fusable
def paid_to(weights: Tensor, visual: Tensor) -> Tensor:
    """Of attention [G, heads, R, L] that to the tokens at `visual` [G, N]."""
    return weights.gather(3, visual[:, None, None].expand(-1, *weights.shape[1:3], -1))


def rotated(head: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate heads [B, heads, L, width] by cosines and sines [B or 1, L, width]."""
    first, second = head.chunk(2, dim=-1)
    return head * cos[:, None] + torch.cat((-second, first), dim=-1) * sin[:, None]


def _heads(module: Any, projection: str, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Project x [B, R, C] with a layer's own weights into rotated heads [B, heads, R, head width]."""
    head = getattr(module, projection)(x).unflatten(-1, (-1, module.head_dim))
    norm = getattr(module, projection[0] + "_norm", None)
    head = (head if norm is None else norm(head)).transpose(1, 2)
    return rotated(head, cos, sin)


def attention_rows(
    layer: Any,
    hidden: Tensor,
    rows: Tensor,
    rotary: tuple[Tensor, Tensor],
    keys: Tensor | None,
    mask: Any,
) -> Tensor:
    """Attention of the tokens at `rows` [B, R] over all L tokens, float32 [B, heads, R, L].

    hidden: [B, L, C], the layer's input. rotary: cosines and sines [B or 1, L, head width]. keys: the
    layer's keys [B, key heads, L, head width] from the cache; projected anew if there is no cache.
    mask: the layer's own attention mask, None, [B, L] or [B, 1, L, L], additive or boolean.
    """
    module, (cos, sin) = layer.self_attn, rotary
    queries = _heads(
        module, "q_proj", layer.input_layernorm(rows_of(hidden, rows)), rows_of(cos, rows), rows_of(sin, rows)
    )
    if keys is None:
        keys = _heads(module, "k_proj", layer.input_layernorm(hidden), cos, sin)
    grouped = queries.float().unflatten(1, (keys.shape[1], -1))
    scale = getattr(module, "scaling", module.head_dim**-0.5)
    logits = torch.einsum("bkgrd,bkld->bkgrl", grouped, keys.float()).flatten(1, 2) * scale
    # Not minus infinity: the row of a token that sees nothing, one of the padding, would be NaN.
    lowest = torch.finfo(logits.dtype).min
    if mask is not None and mask.dim() == 4:
        mask = rows_of(mask[:, 0], rows)[:, None]
        logits = logits.masked_fill(~mask, lowest) if mask.dtype == torch.bool else logits + mask.float()
    else:
        seen = torch.arange(hidden.shape[1], device=rows.device) <= rows[:, :, None]
        if mask is not None:
            seen = seen & mask.bool()[:, None]
        logits = logits.masked_fill(~seen[:, None], lowest)
    return logits.softmax(dim=-1)
