"""Prefill of a batch: by one program where all prompts show pictures of the same sizes, else packed into one sequence.

All prompts are decoded together afterwards, on one cache.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from strategy.graph.alike_prompts import AlikePrompts, split_batch
from strategy.graph.decoder import DECODE_CHUNK, FusedDecoder, GenerationState
from strategy.graph.packed_prefill import prefill_packed
from strategy.metrics.record import Stage
from strategy.pruning.state import PrefillState


def prefill_batch(
    decoder: FusedDecoder, x: Tensor, positions: Tensor, state: PrefillState, generation: GenerationState
) -> Tensor:
    """Run all layers over the prompts of a batch, and fill a cache to decode on.

    Args:
        decoder: Runs the programs.
        x: Embeddings [B, L, C] of bucketed prompts.
        positions: Their positions, [..., B or 1, L].
        state: The state of the prompts, before the first prune.
        generation: Receives the cache, and what finishes the prefill.

    Returns:
        The normalised hidden state [B, 1, C] of each prompt's last token.
    """
    record = decoder.runner.record
    parts = split_batch(state, generation.lengths, decoder.runner.plan)
    left = [generation.lengths[sample] - part.pruned for part in parts for sample in part.samples]
    generation.cache_length = max(left)
    room = generation.cache_length + min(generation.max_new_tokens, DECODE_CHUNK)
    cache = decoder.cache(len(x), max(room, *(part.slots for part in parts)))
    generation.cache = cache
    if len(parts) == 1:
        hidden = decoder.prefill(x, positions, state, cache)
    else:
        record.decide("prefill", "packed, without a graph", "the prompts show pictures of several sizes")
        hidden = prefill_packed(decoder, x, positions, parts, cache)
    a_token = cache.nbytes // (len(x) * cache.length)

    def finish() -> None:
        samples = decoder.runner.finish([part.state for part in parts], _stages_of_batch(parts))
        record.add_cache(samples, generation.cache_length, a_token * sum(left) / len(x))

    generation.finish = finish
    return hidden


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
