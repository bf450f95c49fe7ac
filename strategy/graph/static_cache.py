"""KV caches of fixed size that greedy decoding reads and writes in place."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from strategy.kernels.llama_layer import LayerShape, LayerWeights

MAX_EOS_IDS = 8  # ids that may end an answer
LENGTH_MULTIPLE = 64  # slots; caches are so long or a multiple, so that few graphs serve all lengths


class StaticKVCache:
    """Keys and values of each layer, [B, key heads, slots, width], and the state of decoding on them.

    Attributes:
        token, position, slot: Of the token to be decoded next, [B].
        finished: Which samples are finished, [B].
        all_finished: Whether all are, [1].
        tokens: The decoded tokens, [B, slots], of which there are `step`, [1].
        eos_ids: Ids that end an answer, -1 for none.
        pad_id: The id that follows the end of an answer, [1].
    """

    def __init__(self, shapes: Sequence[LayerShape], batch: int, length: int, like: Tensor) -> None:
        self.length, device = length, like.device
        # Each is a tensor of its own: torch.compile handles writing to one of several views badly.
        self.layers = [
            (
                like.new_zeros(batch, shape.key_heads, length, shape.width),
                like.new_zeros(batch, shape.key_heads, length, shape.width),
            )
            for shape in shapes
        ]
        self.token, self.position, self.slot = torch.zeros(3, batch, dtype=torch.long, device=device)
        self.tokens = torch.zeros(batch, length, dtype=torch.long, device=device)
        self.step = torch.zeros(1, dtype=torch.long, device=device)
        self.eos_ids = torch.full((MAX_EOS_IDS,), -1, device=device)
        self.pad_id = torch.zeros(1, dtype=torch.long, device=device)
        self.finished = torch.zeros(batch, dtype=torch.bool, device=device)
        self.all_finished = torch.zeros(1, dtype=torch.bool, device=device)

    @property
    def nbytes(self) -> int:
        """Return the bytes of keys and values."""
        return sum(keys.nbytes + values.nbytes for keys, values in self.layers)

    def fill(self, number: int, keys: Tensor, values: Tensor) -> None:
        """Copy the keys and values [B, key heads, L, width] of a layer into its first slots."""
        for slots, given in zip(self.layers[number], (keys, values), strict=True):
            slots[:, :, : given.shape[2]] = given

    def clear(self) -> None:
        """Empty all slots, since what is not finite in them would spoil sums even where it is masked."""
        for tensor in chain(*self.layers):
            tensor.zero_()

    def begin(self, first: Tensor, eos_ids: Sequence[int], pad_id: int) -> None:
        """Begin to decode after the first token [B] of each answer."""
        self.token.copy_(first)
        self.eos_ids.copy_(torch.tensor([*eos_ids, *[-1] * (MAX_EOS_IDS - len(eos_ids))]))
        self.pad_id.fill_(pad_id)
        self.finished.copy_((first[:, None] == self.eos_ids).any(1))
        self.step.zero_()

    def append(self, chosen: Tensor) -> None:
        """Append the tokens [B] that were chosen, and move on to the next slot."""
        token = torch.where(self.finished, self.pad_id, chosen)
        self.tokens.index_copy_(1, self.step, token[:, None])
        self.token.copy_(token)
        self.finished |= (token[:, None] == self.eos_ids).any(1)
        torch.all(self.finished, dim=0, keepdim=True, out=self.all_finished)
        for counter in (self.step, self.position, self.slot):
            counter.add_(1)

    def copy_from(self, other: StaticKVCache) -> None:
        """Copy the state of another, shorter cache."""
        self.clear()
        for number, (keys, values) in enumerate(other.layers):
            self.fill(number, keys, values)
        for name in ("token", "position", "slot", "eos_ids", "pad_id", "finished"):
            getattr(self, name).copy_(getattr(other, name))
        self.step.zero_()


class StaticCachePool:
    """The caches of one decoder that captured graphs still use, by their size."""

    def __init__(self) -> None:
        self.caches: WeakValueDictionary[tuple[int, int], StaticKVCache] = WeakValueDictionary()

    def get(
        self, shapes: Sequence[LayerShape], weights: Sequence[LayerWeights], batch: int, length: int
    ) -> StaticKVCache:
        """Return a cache for so many samples with at least so many slots, with the type and device of the weights."""
        length = rounded_length(length)
        cache = self.caches.get((batch, length))
        if cache is None:
            cache = StaticKVCache(shapes, batch, length, weights[0].input_norm)
            self.caches[batch, length] = cache
        return cache


def rounded_length(length: int) -> int:
    """Return the length of a cache with at least so many slots."""
    return -(-length // LENGTH_MULTIPLE) * LENGTH_MULTIPLE
