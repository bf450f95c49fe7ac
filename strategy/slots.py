"""A cache of fixed size that greedy decoding reads and writes in place."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from strategy.fused import Shape

ENDS = 8  # ids that may end an answer


class Slots:
    """Keys and values of each layer, [B, key heads, slots, width], and where decoding on them stands.

    token, position, slot: of the token to be decoded next, [B]. finished: which samples are, [B]; all_finished: [1].
    tokens: those decoded, [B, slots], of which there are `step`, [1]. ends: ids that end an answer, -1 for none; pad:
    what follows the end of a sample's, [1].
    """

    def __init__(self, depth: int, shape: Shape, batch: int, length: int, like: Tensor) -> None:
        self.length, device = length, like.device
        size = (batch, shape.key_heads, length, shape.width)
        # Each a tensor of its own: torch.compile handles writing to one of several views badly.
        self.layers = [(like.new_zeros(size), like.new_zeros(size)) for _ in range(depth)]
        self.token, self.position, self.slot = torch.zeros(3, batch, dtype=torch.long, device=device)
        self.tokens = torch.zeros(batch, length, dtype=torch.long, device=device)
        self.step = torch.zeros(1, dtype=torch.long, device=device)
        self.ends = torch.full((ENDS,), -1, device=device)
        self.pad = torch.zeros(1, dtype=torch.long, device=device)
        self.finished = torch.zeros(batch, dtype=torch.bool, device=device)
        self.all_finished = torch.zeros(1, dtype=torch.bool, device=device)

    @property
    def nbytes(self) -> int:
        """The bytes of keys and values."""
        return sum(keys.nbytes + values.nbytes for keys, values in self.layers)

    def fill(self, number: int, keys: Tensor, values: Tensor) -> None:
        """Put the keys and values [B, key heads, L, width] of a layer into its first slots."""
        for slots, given in zip(self.layers[number], (keys, values), strict=True):
            slots[:, :, : given.shape[2]] = given

    def begin(self, first: Tensor, ends: Sequence[int], pad: int) -> None:
        """Go on from the first token [B] of each answer."""
        self.token.copy_(first)
        self.ends.copy_(torch.tensor([*ends, *[-1] * (ENDS - len(ends))]))
        self.pad.fill_(pad)
        self.finished.copy_((first[:, None] == self.ends).any(1))
        self.step.zero_()

    def put(self, chosen: Tensor) -> None:
        """Take the tokens [B] that were chosen, and move on to the next slot."""
        token = torch.where(self.finished, self.pad, chosen)
        self.tokens.index_copy_(1, self.step, token[:, None])
        self.token.copy_(token)
        self.finished |= (token[:, None] == self.ends).any(1)
        torch.all(self.finished, dim=0, keepdim=True, out=self.all_finished)
        for place in (self.step, self.position, self.slot):
            place.add_(1)

    def take_over(self, other: Slots) -> None:
        """Go on where another, shorter cache stands."""
        for number, (keys, values) in enumerate(other.layers):
            self.fill(number, keys, values)
        for name in ("token", "position", "slot", "ends", "pad", "finished"):
            getattr(self, name).copy_(getattr(other, name))
        self.step.zero_()
