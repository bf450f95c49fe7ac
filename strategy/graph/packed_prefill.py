"""Prefill of prompts with pictures of different sizes, packed into one sequence, through which each layer runs once.

The sequence changes from batch to batch, so no graph is captured; with large pictures, a layer over all prompts takes
long enough to hide what the host does meanwhile.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, chain
from typing import NamedTuple

import torch
from torch import Tensor

from strategy.graph.alike_prompts import AlikePrompts, rows_of
from strategy.graph.decoder import FusedDecoder, layer_states
from strategy.graph.static_cache import StaticKVCache
from strategy.kernels import llama_layer
from strategy.kernels.attention import gather_rows
from strategy.kernels.packed_attention import keeping_bounds
from strategy.kernels.transfers import tensor_on
from strategy.pruning.stage import LayerStates


class _Packing:
    """Where the parts of a batch lie in one sequence of T tokens.

    Args:
        sizes: For each part, how many prompts it has, and how long each of them is.

    Attributes:
        ends: Where the prompts begin and the last one ends, on the CPU.
    """

    def __init__(self, sizes: Sequence[tuple[int, int]]) -> None:
        lengths = chain.from_iterable([length] * count for count, length in sizes)
        self.sizes, self.ends = sizes, torch.tensor([0, *accumulate(lengths)], dtype=torch.int32)
        # Layers are compiled once for all numbers of prompts.
        torch._dynamo.maybe_mark_dynamic(self.ends, 0)

    def starts(self) -> list[int]:
        """Return where the parts begin."""
        return [0, *accumulate(count * length for count, length in self.sizes)][:-1]

    def split(self, packed: Tensor, dim: int = 1) -> list[Tensor]:
        """Return each part's own [G, L, C] of [1, T, C], or [G, heads, L, width] of [1, heads, T, width], dim = 2."""
        pieces = packed[0].split([count * length for count, length in self.sizes], dim=dim - 1)
        return [
            piece.unflatten(dim - 1, size).movedim(dim - 1, 0) for piece, size in zip(pieces, self.sizes, strict=True)
        ]


def _pack(parts: Sequence[Tensor]) -> Tensor:
    """Return tensors [G, L, C] as one sequence [1, T, C]."""
    return torch.cat([part.flatten(0, 1) for part in parts])[None]


class _Computed(NamedTuple):
    """Keys and values [1, key heads, T, width] of a layer, which are not in the cache yet."""

    number: int
    packing: _Packing
    keys: Tensor
    values: Tensor


def prefill_packed(
    decoder: FusedDecoder, x: Tensor, positions: Tensor, parts: Sequence[AlikePrompts], cache: StaticKVCache
) -> Tensor:
    """Run all layers over the prompts of a batch, and fill a cache.

    Args:
        decoder: Has the layers, and prunes between them.
        x: Embeddings [B, L, C] of bucketed prompts.
        positions: Their positions, [..., B or 1, L].
        parts: The parts of the batch, whose states receive the stages.
        cache: The cache, one of this decoder.

    Returns:
        The normalised hidden state [B, 1, C] of each prompt's last token.
    """
    samples = list(chain.from_iterable(part.samples for part in parts))
    order = tensor_on(x.device, sorted(range(len(samples)), key=samples.__getitem__))
    with decoder.policy.compiling("prefilling", decoder.graphs.device), keeping_bounds({}):
        cache.clear()
        x, packing = _run_layers(decoder, x, positions, parts, cache, order)
        own = packing.split(x)
        last = [part.state.last_positions(hidden.shape[1]) for part, hidden in zip(parts, own, strict=True)]
        hidden = [gather_rows(*each) for each in zip(own, last, strict=True)]
        if decoder.runner.plan:
            for part, tokens in zip(parts, hidden, strict=True):
                part.state.finite = part.state.finite & tokens.isfinite().all()
        position = [part.state.position.expand(len(part.rows), -1) for part in parts]
        cache.slot.copy_(torch.cat(last)[order, 0] + 1)
        cache.position.copy_(torch.cat(position)[order, 0])
        return decoder.final_norm(torch.cat(hidden)[order])


def _run_layers(
    decoder: FusedDecoder,
    x: Tensor,
    positions: Tensor,
    parts: Sequence[AlikePrompts],
    cache: StaticKVCache,
    order: Tensor,
) -> tuple[Tensor, _Packing]:
    """Return what is left of the packed sequence [1, T, C] behind the last layer, and where the parts lie in it."""
    plan, states = decoder.runner.plan, [part.state for part in parts]
    stages = {layer: stage for stage, layer in enumerate(plan.layers)} if plan else {}
    packing = _Packing([(len(part.rows), part.length) for part in parts])
    x = _pack([x[part.rows, : part.length] for part in parts])
    cos, sin = decoder.backbone.rotary_at(decoder.decoder, _packed_positions(positions, parts))
    whole = [packing.split(table) for table in (cos, sin)]

    def prune(stage: int, x: Tensor, seen: Sequence[LayerStates | None]) -> Tensor:
        nonlocal packing, cos, sin
        given = zip(states, packing.split(x), seen, strict=True)
        left = [decoder.runner.prune(state, stage, own, layer) for state, own, layer in given]
        packing = _Packing([(len(own), own.shape[1]) for own in left])
        cos, sin = (
            _pack([table if state.index is None else gather_rows(table, state.index) for state, table in pairs])
            for pairs in (zip(states, tables, strict=True) for tables in whole)
        )
        return _pack(left)

    computed: list[_Computed] = []
    if 0 in stages:
        x = prune(0, x, [None] * len(parts))
    for number, (own, shape) in enumerate(zip(decoder.weights.layers, decoder.weights.shapes, strict=True)):
        if plan and number == plan.reference:
            for state, reference in zip(states, packing.split(x), strict=True):
                state.reference = reference
        entered = x
        x, queries, keys, values = llama_layer.prefill(x, cos, sin, own, shape, packing.ends)
        computed.append(_Computed(number, packing, keys, values))
        if number + 1 in stages:
            seen = (packing.split(entered), packing.split(queries, 2), packing.split(keys, 2))
            x = prune(stages[number + 1], x, [layer_states(*each, shape) for each in zip(*seen, strict=True)])
            del seen  # views of tensors of the length before
        if number < len(states[0].added):
            x = x + _pack([state.remaining_rows(state.added[number]) for state in states]).to(x)
        if plan is None or number + 1 >= plan.layers[-1]:
            _write_cache(cache, parts, computed, order)
            computed = []
    return x, packing


def _packed_positions(positions: Tensor, parts: Sequence[AlikePrompts]) -> Tensor:
    """Return the positions of packed prompts, [..., 1, T], out of those of a batch, [..., B or 1, L]."""
    own = [rows_of(positions, -2, part.rows)[..., : part.length] for part in parts]
    same = [each.expand(*each.shape[:-2], len(part.rows), -1) for each, part in zip(own, parts, strict=True)]
    return torch.cat([each.flatten(-2) for each in same], dim=-1)[..., None, :]


def _write_cache(
    cache: StaticKVCache, parts: Sequence[AlikePrompts], layers: Sequence[_Computed], order: Tensor
) -> None:
    """Write what is left of the keys and values of some layers into the slots of a cache.

    Args:
        cache: The cache.
        parts: The parts of the batch, of which everything is pruned that will be.
        layers: The layers.
        order: Which of the prompts of all parts is the first, second, ... of the batch, [B].
    """
    known: dict[_Packing, Tensor] = {}
    for number, packing, keys, values in layers:
        if packing not in known:
            known[packing] = _left(parts, packing, number, order)
        llama_layer.write_cache_packed(*cache.layers[number], keys, values, known[packing])


def _left(parts: Sequence[AlikePrompts], packing: _Packing, number: int, order: Tensor) -> Tensor:
    """Return the places [B, L] in a layer's packed sequence of what is left of each prompt.

    Shorter prompts repeat their last place, since a token of another prompt may not be finite.
    """
    rows = []
    for part, (count, length), start in zip(parts, packing.sizes, packing.starts(), strict=True):
        begins = start + length * torch.arange(count, device=order.device)[:, None]
        left = part.state.cache_positions(part.state.prunes_before(number))
        rows.append(begins + (torch.arange(length, device=order.device) if left is None else left))
    at = torch.arange(max(own.shape[1] for own in rows), device=order.device)
    return torch.cat([own[:, at.clamp(max=own.shape[1] - 1)] for own in rows])[order]
