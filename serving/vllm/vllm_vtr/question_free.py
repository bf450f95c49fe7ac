"""Prompts without their questions, for strategies that ask what is looked at before anything is asked."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from strategy.kernels.attention import gather_rows, softmax_rows
from strategy.metrics.timing import Clock


class PromptEnds:
    """Runs what follows the visual tokens of prompts without their questions.

    Attention is causal: up to its visual tokens, a prompt without its question is the prompt itself. So the first token
    behind them and those of the template run beside the prompts, and see the keys and values of these.

    Args:
        behind: The first token behind the visual ones of each prompt, counted in the padded prompts.
        templates: How many of each prompt's last tokens are those of a template.
        padded: [B, L], where the prompts' tokens stand in the batch, padding on the left included.
        real: [B, L], False at padding.
        positions: [tokens], or several kinds of them.
        embeds: [tokens, C].
        clock: Counts the seconds as scoring.
    """

    def __init__(
        self,
        behind: Sequence[int],
        templates: Sequence[int],
        padded: Tensor,
        real: Tensor,
        positions: Tensor,
        embeds: Tensor,
        clock: Clock,
    ) -> None:
        length, self.clock, self.padded = padded.shape[1], clock, padded
        rows = [
            [first, *range(max(first + 1, length - template), length)]
            for first, template in zip(behind, templates, strict=True)
        ]
        most = max(map(len, rows))
        index = torch.tensor([row + row[:1] * (most - len(row)) for row in rows])
        first, counts = torch.tensor([behind, list(map(len, rows))])
        # Positions of text increase by one with each token.
        stand = first[:, None] + torch.arange(most).clamp(max=counts[:, None] - 1)
        index, stand, first, self.last = (
            tensor.to(padded.device) for tensor in (index, stand, first[:, None], length + counts[:, None] - 1)
        )
        self.positions = positions[..., padded.gather(1, stand).flatten()]
        self.hidden, self.residual = embeds[padded.gather(1, index).flatten()], None
        before = real & (torch.arange(length, device=padded.device) < first)
        causal = torch.ones(most, most, dtype=torch.bool, device=padded.device).tril()
        self.mask = torch.cat((before[:, None].expand(-1, most, -1), causal.expand(len(rows), -1, -1)), dim=-1)[:, None]
        self.seen = F.pad(before, (0, most), value=True)

    def run(self, layer: Any, key: Tensor, value: Tensor) -> None:
        """Run one layer, given the keys and values [tokens, key heads * head width] that it computed of the batch."""
        since, attn = self.clock.start(key.device), layer.self_attn.attn

        def split(projected: Tensor, heads: int) -> Tensor:
            return projected.unflatten(-1, (heads, -1)).transpose(1, 2)

        def attend(query: Tensor, own_key: Tensor, own_value: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            batch = len(self.padded)
            keys, values = (
                split(torch.cat((of_batch[self.padded], own.unflatten(0, (batch, -1))), dim=1), attn.num_kv_heads)
                for of_batch, own in ((key, own_key), (value, own_value))
            )
            self.query, self.keys = split(query.unflatten(0, (batch, -1)), attn.num_heads), keys
            output = F.scaled_dot_product_attention(
                self.query, keys, values, attn_mask=self.mask, scale=attn.impl.scale, enable_gqa=True
            )
            return output.transpose(1, 2).flatten(2).flatten(0, 1)

        attn.forward = attend
        try:
            self.hidden, self.residual = layer(self.positions, self.hidden, self.residual)
        finally:
            del attn.forward
        self.clock.stop("scoring", since)

    def attention(self, scale: float) -> Tensor:
        """Return the attention [B, heads, L] that their last tokens paid in the layer that ran last."""
        length = self.padded.shape[1]
        own = (self.last - length)[:, None].expand(-1, self.query.shape[1], -1)
        query = gather_rows(self.query.flatten(0, 1), own.flatten(0, 1)).unflatten(0, self.query.shape[:2])
        return softmax_rows(query, self.keys, scale, self.last, self.seen)[:, :, 0, :length]
