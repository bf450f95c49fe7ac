"""One step in which prompts are pruned: the decoder's loop over the tokens of a batch, of which fewer are left."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from vllm.distributed.parallel_state import get_tp_group
from vllm.forward_context import get_forward_context

from strategy import RunRecord
from strategy.backbone import Span
from strategy.kernels.attention import gather_rows, softmax_rows
from strategy.metrics.meter import CostMeter
from strategy.pruning.layout import resolve_layout
from strategy.pruning.stage import LayerStates, StageRunner
from strategy.pruning.state import PrefillState
from vllm_vtr.question_free import PromptEnds

if TYPE_CHECKING:
    from vllm_vtr.configuration import Pruning
    from vllm_vtr.model_state import AttentionCall, PruningModelState


class Prompt(NamedTuple):
    """A prompt that is prefilled whole.

    row: In the batch. slot: Of its request. first: Its first token in the batch. length: How many tokens it has.
    spans: Of its pictures and videos. template: How many of its last tokens are those of a template.
    """

    row: int
    slot: int
    first: int
    length: int
    spans: list[Span]
    template: int


class Seconds(CostMeter):
    """Measures seconds, and counts no operations, which a server has no table for."""

    @contextmanager
    def scoring(self, *shapes: Any) -> Iterator[None]:
        yield


def ragged(starts: Tensor, lengths: Tensor, total: int) -> Tensor:
    """Return rows of consecutive numbers, one after the other.

    Args:
        starts: The first number of each row.
        lengths: How many numbers each row has.
        total: Their sum, known on the host.
    """
    before = lengths.cumsum(0) - lengths
    return torch.arange(total, device=starts.device) + (starts - before).repeat_interleave(lengths, output_size=total)


class PruningPrefill:
    """Runs a batch that has prompts to prune.

    vLLM has the tokens of a batch one after the other, [tokens, C]. Strategies see the prompts that are pruned as
    [B, L, C], padded on the left. After each stage the batch is put together anew.

    Args:
        state: The state of the requests.
        batch: vLLM's description of the batch.
        prompts: Those to prune, in the order of their rows.

    Attributes:
        numbers: The prompts' rows in the batch.
        lengths: How many tokens each row of the batch has, on the host.
        left: The same of the prompts that are pruned.
        whole, longest: `left` before the first stage, and the greatest of it.
        query, key, value: [tokens, heads * head width], of the layer before a stage; with `ends`, of each before it.
        ends: Runs prompts without their questions beside them, for strategies that want that; else None.
        starts, counts: Where each prompt begins in the batch, and how many tokens it has, on the device.
        rows: Where the prompts' tokens stand in the batch, one prompt after the other.
        real: [B, L], False at padding.
        pruned: What the stages know of the prompts.
        origin: [tokens], where each token stood in the batch as it came.
        places: [tokens], where each token lies in the cache of its request.
        padded: [B, L], where the prompts' tokens stand in the batch.
        survivors: For each stage that pruned, which tokens are left of those of the pruned prompts before it.
        saved: By layer, how many stages came before it, and its keys and values of the pruned prompts.
    """

    def __init__(self, state: PruningModelState, batch: Any, prompts: Sequence[Prompt]) -> None:
        self.state, self.batch, self.prompts = state, batch, prompts
        self.call: AttentionCall | None = None
        self.runner, self.plan = state.runner, state.pruning.plan
        self.numbers = [prompt.row for prompt in prompts]
        self.lengths = batch.num_scheduled_tokens[: batch.num_reqs].astype(np.int64)
        self.left = np.array([prompt.length for prompt in prompts])
        self.whole, self.longest = self.left.copy(), int(self.left.max())
        self.device = batch.positions.device
        self.survivors: list[Tensor] = []
        self.saved: dict[int, tuple[int, Tensor, Tensor]] = {}
        self.query: Tensor | None = None
        self.key: Tensor | None = None
        self.value: Tensor | None = None
        self.ends: PromptEnds | None = None

    @staticmethod
    def stage_runner(pruning: Pruning, model: Any) -> StageRunner:
        """Return what runs the stages of a model's prefills."""
        layers = model.language_model.model.layers
        record = RunRecord(pruning.strategy.config.strategy, len(layers), pruning.plan)
        group = get_tp_group()
        heads = group.device_group if group.world_size > 1 else None
        return StageRunner(pruning.strategy, pruning.plan, Seconds(record, [], [], 0), heads, None)

    def run(self, decoder: Any, positions: Tensor, embeds: Tensor, added: Sequence[Tensor]) -> Tensor:
        """Return the output [tokens, C] of the decoder, zero for tokens that were pruned.

        Args:
            decoder: The decoder.
            positions: [tokens], or several kinds of them, padding included.
            embeds: What enters the first layer, [tokens, C], padding included.
            added: See `Backbone.added_features`, [tokens, C] for each layer.
        """
        hidden, residual = self._begin(positions, embeds), None
        own = positions[..., self.origin]
        for number, layer in enumerate(decoder.layers):
            if number == self.plan.layers[0] == 0:
                hidden = self._prune(0, hidden, None)
                own = positions[..., self.origin]
            if number == self.plan.reference:
                self.pruned.reference = self._stream(hidden, residual)[self.padded]
            attn, stage = layer.self_attn.attn, self._stage_behind(number)
            # Before the layer, whose norm adds to the residual in place.
            entered = None if stage is None else self._stream(hidden, residual)[self.padded]
            with self._saving(number, attn):
                hidden, residual = layer(own, hidden, residual)
            if self.ends is not None and number < self.plan.layers[0]:
                assert self.key is not None
                assert self.value is not None
                self.ends.run(layer, self.key, self.value)
                self.pruned.prior = self.ends.attention(attn.impl.scale) if stage == 0 else None
            if stage is not None and entered is not None:
                states = LayerStates(entered, partial(self._keys, attn, self.padded), partial(self._attention, attn))
                hidden, residual = self._prune(stage, self._stream(hidden, residual), states), None
                own = positions[..., self.origin]
            if number < len(added):
                hidden = hidden + added[number][self.origin]
        output, _ = decoder.norm(hidden, residual)
        self._compact(decoder.layers)
        last = output[self.starts + self.counts - 1].isfinite().all()
        sound = self.pruned.finite & self.pruned.selected & last
        self.state.finish(self.prompts, self.left.tolist(), sound)
        return output.new_zeros(len(embeds), output.shape[1]).index_copy_(0, self.origin, output)

    def _stage_behind(self, number: int) -> int | None:
        layers = self.plan.layers
        return layers.index(number + 1) if number + 1 in layers else None

    @staticmethod
    def _stream(hidden: Tensor, residual: Tensor | None) -> Tensor:
        return hidden if residual is None else hidden + residual

    def _begin(self, positions: Tensor, embeds: Tensor) -> Tensor:
        count, length = self.batch.num_tokens, self.longest
        self.origin = torch.arange(count, device=self.device)
        self.places = self.state.places(self.batch)[:count]
        self._place(length)
        padding = (length - self.left).tolist()
        layout = [
            [span._replace(start=_shifted(span.start, before)) for span in prompt.spans]
            for prompt, before in zip(self.prompts, padding, strict=True)
        ]
        self.pruned = PrefillState.from_layout(layout, self.padded, self.real, None)
        if self.state.tower is not None:
            self.state.tower.assign(self.pruned, self.state.shown(self.prompts))
        if self.state.pruning.strategy.question_free:
            behind = [
                max(span.starts[-1] + span.frame_size for span in spans)
                for spans in resolve_layout(layout, len(layout), length)
            ]
            templates, clock = [prompt.template for prompt in self.prompts], self.runner.record.clock
            self.ends = PromptEnds(behind, templates, self.padded, self.real, positions, embeds, clock)
        return embeds[:count]

    def _place(self, length: int) -> None:
        """Find the pruned prompts' tokens in the batch as it now is."""
        ends = self.lengths.cumsum()
        # Small and pinned, so that the host does not wait.
        self.starts, self.counts = self._to_device((ends - self.lengths)[self.numbers], self.left)
        cells = torch.arange(length, device=self.device) - (length - self.counts)[:, None]
        self.real = cells >= 0
        self.padded = self.starts[:, None] + cells.clamp(min=0)
        self.rows = ragged(self.starts, self.counts, int(self.left.sum()))

    def _to_device(self, *numbers: np.ndarray) -> Tensor:
        given = torch.from_numpy(np.stack(numbers))
        return given.pin_memory().to(self.device, non_blocking=True) if self.device.type == "cuda" else given

    @contextmanager
    def _saving(self, number: int, attn: Any) -> Iterator[None]:
        """Keep what a layer's attention is called with, of a layer that a stage comes behind."""
        if number >= self.plan.layers[-1]:
            yield
            return

        def keep(module: Any, args: tuple[Any, ...]) -> None:
            query, key, value = args[:3]
            # Copies of what is needed: a view would keep all of the layer's projections.
            self.saved[number] = len(self.survivors), key[self.rows], value[self.rows]
            if self.ends is not None or self._stage_behind(number) is not None:
                self.query, self.key, self.value = query, key, value

        handle = attn.register_forward_pre_hook(keep)
        try:
            yield
        finally:
            handle.remove()

    def _keys(self, attn: Any, places: Tensor) -> Tensor:
        """Return the keys [G, key heads, L, head width] of tokens at places [G, L] of the batch."""
        assert self.key is not None
        return self.key[places].unflatten(-1, (attn.num_kv_heads, -1)).transpose(1, 2)

    def _attention(self, attn: Any, positions: Tensor, select: Callable[[Tensor], Tensor]) -> Tensor:
        """Return the attention [G, heads, R, L] of tokens at positions [G, R] of prompts, see `AttentionFn`."""
        assert self.query is not None
        places = select(self.padded)
        queries = self.query[gather_rows(places, positions)].unflatten(-1, (attn.num_heads, -1)).transpose(1, 2)
        return softmax_rows(queries, self._keys(attn, places), attn.impl.scale, positions, select(self.real))

    def _prune(self, stage: int, stream: Tensor, states: LayerStates | None) -> Tensor:
        """Return what a stage leaves of the residual stream [tokens, C], and let attention see that."""
        before, length, were = len(self.pruned.gather_indices), self.padded.shape[1], self.left.copy()
        pruned = self.runner.prune(self.pruned, stage, stream[self.padded], states)
        if len(self.pruned.gather_indices) == before:
            return stream
        for group in self.pruned.groups:
            self.left[group.samples] = self.whole[group.samples] - (self.longest - group.remaining.shape[1])
        left, shorter = int(self.left.sum()), pruned.shape[1]
        [counts, ahead] = self._to_device(self.left, were.cumsum() - were - (length - were))
        # What is left of a prompt stands at the end of its row.
        cells = ragged(torch.arange(1, len(counts) + 1, device=self.device) * shorter - counts, counts, left)
        take = self.pruned.gather_indices[-1]
        self.survivors.append((take + ahead[:, None]).flatten()[cells])
        origin = self.origin[self.padded].gather(1, take).flatten()
        places = (torch.arange(shorter, device=self.device) - (shorter - counts)[:, None]).flatten()
        # Each row of the batch comes from where it stood, or from the prompts that were pruned.
        starts = self.lengths.cumsum() - self.lengths
        starts[self.numbers] = len(stream) + np.arange(1, len(counts) + 1) * shorter - self.left
        self.lengths[self.numbers] = self.left
        [first, lengths] = self._to_device(starts, self.lengths)
        index = ragged(first, lengths, int(self.lengths.sum()))
        self.origin = torch.cat((self.origin, origin))[index]
        self.places = torch.cat((self.places, places))[index]
        self._place(shorter)
        self._attend()
        return torch.cat((stream, pruned.flatten(0, 1)))[index]

    def _attend(self) -> None:
        """Let the attention of the layers that follow see the batch as it now is."""
        batch, total, rows = self.batch, int(self.lengths.sum()), self.numbers
        starts = np.concatenate(([0], self.lengths.cumsum())).astype(np.int32)
        most, lens = batch.seq_lens_cpu_upper_bound.clone(), batch.seq_lens.clone()
        most[rows] = torch.from_numpy(self.left).to(most.dtype)
        [given] = self._to_device(np.concatenate((starts, self.left, rows)))
        count = len(starts)
        own, at = given[count : count + len(rows)], given[count + len(rows) :]
        lens[at] = own.to(lens.dtype)
        shorter = replace(
            batch,
            num_tokens=total,
            num_tokens_after_padding=total,
            query_start_loc=given[:count].to(batch.query_start_loc.dtype),
            query_start_loc_np=starts,
            num_scheduled_tokens=self.lengths.astype(np.int32),
            seq_lens=lens,
            seq_lens_cpu_upper_bound=most,
            positions=self.places,
        )
        assert self.call is not None
        context = get_forward_context()
        context.attn_metadata, context.slot_mapping = self.state.attention_over(shorter, self.places, self.call)

    def _compact(self, layers: Any) -> None:
        """Give the caches of the layers before the last stage the form that the others have."""
        if not self.survivors:
            return
        index = torch.arange(len(self.rows), device=self.device)
        kept = {len(self.survivors): index}
        for before in reversed(range(len(self.survivors))):
            index = kept[before] = self.survivors[before][index]
        slots = get_forward_context().slot_mapping
        for number, (before, key, value) in self.saved.items():
            if before < len(self.survivors):
                attn = layers[number].self_attn.attn
                heads = (attn.num_kv_heads, attn.head_size)
                attn.impl.do_kv_cache_update(
                    attn,
                    key[kept[before]].unflatten(-1, heads),
                    value[kept[before]].unflatten(-1, heads),
                    attn.kv_cache,
                    slots[attn.layer_name][self.rows],
                )


def _shifted(start: int | tuple[int, ...], by: int) -> int | tuple[int, ...]:
    return tuple(each + by for each in start) if isinstance(start, tuple) else start + by
