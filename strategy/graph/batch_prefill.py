"""Prefill of a batch by programs: one for each part of the batch whose prompts show pictures of the same sizes.

All prompts are decoded together afterwards, on one cache.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from strategy.graph.bucketing import padded_length
from strategy.graph.decoder import DECODE_CHUNK, FusedDecoder, GenerationState
from strategy.metrics.record import Stage
from strategy.pruning.state import PrefillState, SampleGroup


class AlikePrompts(NamedTuple):
    """Prompts of a batch with the same grids.

    rows: Their numbers in the batch, [G]. length: Of the longest one, padded. pruned: How many visual tokens each
    loses. state: Their own state, as if there were no other prompts.
    """

    rows: Tensor
    length: int
    pruned: int
    state: PrefillState

    @property
    def samples(self) -> Sequence[int]:
        """Return their numbers in the batch."""
        return self.state.groups[0].samples

    @property
    def slots(self) -> int:
        """Return how many slots of a cache a program writes for each prompt, padding included."""
        return self.length - self.pruned


def prefill_batch(
    decoder: FusedDecoder, x: Tensor, positions: Tensor, state: PrefillState, generation: GenerationState
) -> Tensor:
    """Run all layers over the prompts of a batch, write the record, and fill a cache to decode on.

    Args:
        decoder: Runs the programs.
        x: Embeddings [B, L, C] of bucketed prompts.
        positions: Their positions, [..., B or 1, L].
        state: The state of the prompts, before the first prune.
        generation: Receives the cache.

    Returns:
        The normalised hidden state [B, 1, C] of each prompt's last token.
    """
    parts = list(_split(decoder, state, generation.lengths))
    left = [generation.lengths[sample] - part.pruned for part in parts for sample in part.samples]
    generation.cache_length = max(left)
    room = generation.cache_length + min(generation.max_new_tokens, DECODE_CHUNK)
    cache = decoder.cache(len(x), max(room, *(part.slots for part in parts)))
    generation.cache = cache
    if len(parts) == 1:
        hidden = decoder.prefill(x, positions, state, cache)
    else:
        hidden = x.new_empty(len(x), 1, x.shape[2])
        cache.clear()
        for part in parts:
            own_cache = decoder.cache(len(part.samples), part.slots)
            own_positions = _rows(positions, -2, part.rows)[..., : part.length]
            own_x = x[part.rows, : part.length]
            own = decoder.prefill(own_x, own_positions, part.state, own_cache, own_cache.nbytes)
            hidden.index_copy_(0, part.rows, own)
            cache.insert(part.rows, own_cache, part.slots)
    samples = decoder.runner.finish([part.state for part in parts], _stages_of_batch(parts))
    a_token = cache.nbytes // (len(x) * cache.length)
    decoder.runner.record.add_cache(samples, generation.cache_length, a_token * sum(left) / len(x))
    return hidden


def _split(decoder: FusedDecoder, state: PrefillState, lengths: Sequence[int]) -> Iterator[AlikePrompts]:
    """Yield the parts of a batch, given how long each prompt is without padding.

    Of a batch with several grids, a part has 1, 2, 4, ... prompts, since layers are compiled for each number anew.
    """
    plan = decoder.runner.plan
    for group in state.groups:
        pruned = group.num_visual - plan.kept(group.num_visual)[-1] if plan else 0
        if len(state.groups) == 1:
            length = state.real.shape[1]
            yield AlikePrompts(group.batch_index, length, pruned, state)
            continue
        begin = 0
        while rest := len(group.samples) - begin:
            end = begin + (1 << rest.bit_length() - 1)
            length = padded_length(max(lengths[sample] for sample in group.samples[begin:end]))
            # Where only padding follows a picture, one token of it stands for the question.
            length = max(length, state.real.shape[1] - group.question_mask.shape[1] + 1)
            own = _state_of(state, group, slice(begin, end), length)
            yield AlikePrompts(group.batch_index[begin:end], length, pruned, own)
            begin = end


def _state_of(state: PrefillState, group: SampleGroup, part: slice, length: int) -> PrefillState:
    """Return the state, before the first prune, of a part of a group whose prompts are no longer than `length`."""
    rows, cut = group.batch_index[part], state.real.shape[1] - length
    # What is cut off is padding, behind the last token of each prompt.
    question = group.question_mask[part, : group.question_mask.shape[1] - cut].clone()
    question[:, -1] |= ~question.any(1)
    own = replace(
        group,
        samples=group.samples[part],
        batch_index=torch.arange(len(rows), device=rows.device),
        remaining=group.remaining[part, :length],
        visual=group.visual[part],
        text=group.text[part, : length - group.num_visual].contiguous(),
        original_index=group.original_index[part],
        question_mask=question,
        memo={},
        encoder=tuple(tensor[part] for tensor in group.encoder),
        joint=tuple(tensor[part] for tensor in group.joint),
    )
    return PrefillState(
        [own],
        state.real[rows, :length],
        state.last[rows],
        _rows(state.position, 0, rows),
        added=[tensor[rows, :length] for tensor in state.added],
        prior=None if state.prior is None else state.prior[rows, :, :length],
    )


def _rows(tensor: Tensor, dim: int, rows: Tensor) -> Tensor:
    """Return the rows of a tensor along a dimension; all of it if that dimension holds one row for all."""
    return tensor if tensor.shape[dim] == 1 else tensor.index_select(dim, rows)


def _stages_of_batch(parts: Sequence[AlikePrompts]) -> list[Stage]:
    """Return the stages of all parts as those of one prefill."""
    stages = []
    for each in zip(*(part.state.stages for part in parts), strict=True):
        kept: dict[int, Tensor] = {}
        for part, stage in zip(parts, each, strict=True):
            kept |= zip(part.samples, stage.kept, strict=True)
        before, after = sum(stage.before for stage in each), sum(stage.after for stage in each)
        stages.append(Stage(each[0].layer, before, after, tuple(kept[sample] for sample in sorted(kept))))
    return stages
