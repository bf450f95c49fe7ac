"""One stage: select visual tokens, merge, and drop the others."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import reduce
from operator import and_
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from strategy.base import EncoderView, JointView, Strategy, View
from strategy.distributed.collectives import all_gather_heads, broadcast_first
from strategy.kernels.attention import attention_to, gather_rows
from strategy.kernels.selection import all_finite, is_selection, select_top
from strategy.metrics.meter import CostMeter
from strategy.metrics.record import Stage
from strategy.plan import Plan
from strategy.pruning.state import PrefillState, SampleGroup

Watch = Callable[[View, Tensor | None, Tensor], None]
"""Called at each stage for each group of samples with their view, their scores [G, N] and the kept tokens [G, K].

The scores are None where the strategy selects without scores.
"""

AttentionFn = Callable[[Tensor, Callable[[Tensor], Tensor]], Tensor]
"""Computes attention [G, heads, R, L] of tokens at sequence indices [G, R], given what picks their samples."""


class LayerStates(NamedTuple):
    """What a stage may see of the layer that ran before it.

    entered: Its input [B, L, C]. keys: Returns its keys [B, key heads, L, head width]. attention: See `AttentionFn`.
    """

    entered: Tensor
    keys: Callable[[], Tensor]
    attention: AttentionFn


class StageRunner:
    """Prunes hidden states between two layers; the stock layers and the fused ones share it.

    Args:
        strategy: Selects the visual tokens; None for an unpruned model.
        plan: Where it prunes; None for an unpruned model.
        meter: Counts the costs, into its record.
        tp_group: The ranks that the decoder's heads are split over, or None.
        watch: See `Watch`; what it does is not counted.
    """

    def __init__(
        self,
        strategy: Strategy | None,
        plan: Plan | None,
        meter: CostMeter,
        tp_group: ProcessGroup | None,
        watch: Watch | None,
    ) -> None:
        self.strategy, self.plan, self.meter, self.tp_group, self.watch = strategy, plan, meter, tp_group, watch
        self.record = meter.record

    def prune(self, state: PrefillState, stage: int, hidden: Tensor, layer: LayerStates | None = None) -> Tensor:
        """Return what a stage keeps of hidden states [B, L, C].

        Args:
            state: The state of the forward call.
            stage: The stage, counted from 0.
            hidden: The output of the layer before, or the input of the first layer.
            layer: What else there is of that layer; None before the first layer.
        """
        assert self.plan
        since = self.record.clock.start(hidden.device)
        before = sum(group.original_index.numel() for group in state.groups)
        stays = []
        for group in state.groups:
            keep = self.plan.kept(group.num_visual)[stage]
            offset = hidden.shape[1] - group.remaining.shape[1]
            if keep < group.original_index.shape[1]:
                ranked: list[Tensor] = []
                view = self._view(state, group, stage, keep, hidden, layer, ranked)
                hidden, chosen = self._select(state, group, view, hidden, ranked)
                if self.watch:
                    self.record.clock.stop("scoring", since)
                    self.watch(view, ranked[-1] if ranked else None, chosen)
                    since = self.record.clock.start(hidden.device)
                stay = group.keep(chosen)
            else:
                stay = torch.arange(group.remaining.shape[1], device=hidden.device).expand(len(group.samples), -1)
            stays.append(stay + offset if offset else stay)
        after = sum(group.original_index.numel() for group in state.groups)
        state.stages.append(Stage(self.plan.layers[stage], before, after, state.kept()))
        hidden = state.prune(stays, hidden) if after < before else hidden
        self.record.clock.stop("scoring", since)
        return hidden

    def _select(
        self, state: PrefillState, group: SampleGroup, view: View, hidden: Tensor, ranked: Sequence[Tensor]
    ) -> tuple[Tensor, Tensor]:
        """Return the hidden states with the merged tokens, and the kept tokens [G, K]."""
        assert self.strategy
        samples, count = view.visual.shape
        shapes = (group.grids, view.visual.shape, view.question.shape, hidden.shape[1:])
        with self.meter.scoring(view.stage, view.keep, state.projects_keys, *shapes):
            chosen = self._checked("select", self.strategy.select(view), (samples, view.keep)).long()
            chosen = broadcast_first(chosen, self.tp_group)
            state.selected = state.selected & is_selection(chosen, count)
            # An index out of range would end the process of a GPU before `finish` can name the strategy.
            chosen = chosen.clamp(0, count - 1)
            weights = self.strategy.merge(view, chosen)
            if weights is not None:
                weights = self._checked("merge", weights, (*chosen.shape, count)).float()
                weights = broadcast_first(weights, self.tp_group)
                merged = (weights @ view.features.float()).to(hidden.dtype)
                positions = view.visual.gather(1, chosen)
                hidden = hidden.index_put((group.batch_index[:, None].expand_as(positions), positions), merged)
        # At later stages, features that are not finite show in the scores, or at the end.
        if ranked or not view.stage:
            fine = all_finite(ranked[-1] if ranked else None, None if view.stage else view.features)
            state.finite = state.finite & fine
        return hidden, chosen

    def _checked(self, method: str, returned: Any, shape: Sequence[int]) -> Tensor:
        """Return what a strategy's method returned; ValueError if it has not the shape that is wanted."""
        found = list(returned.shape) if isinstance(returned, Tensor) else type(returned).__name__
        if found != list(shape):
            raise ValueError(f"{self.record.strategy}: {method}() returned {found}, want a tensor {list(shape)}")
        return returned

    def _view(
        self,
        state: PrefillState,
        group: SampleGroup,
        stage: int,
        keep: int,
        hidden: Tensor,
        layer: LayerStates | None,
        ranked: list[Tensor],
    ) -> View:
        """Return what the strategy sees; the scores that it ranks by are added to `ranked`."""
        offset = hidden.shape[1] - group.remaining.shape[1]

        def shifted(positions: Tensor) -> Tensor:
            return positions + offset if offset else positions

        visual = shifted(group.visual)

        def of_group(tensor: Tensor) -> Tensor:
            return state.select(group, tensor.to(hidden.device))

        def before(wanted: str) -> LayerStates:
            if layer is None:
                raise ValueError(f"{self.record.strategy} asks for {wanted} layer 0: prune at layer 1 or later")
            return layer

        def entered_at(positions: Tensor) -> Tensor:
            return gather_rows(of_group(before("the input of a layer, and there is none before").entered), positions)

        def keys_at(positions: Tensor) -> Tensor:
            keys = of_group(before("keys, which no layer computes before").keys()).transpose(1, 2)
            return all_gather_heads(gather_rows(keys, positions).transpose(1, 2), self.tp_group)

        def attention(query_positions: Tensor) -> Tensor:
            weights = before("attention, which nothing pays before").attention(query_positions, of_group)
            return all_gather_heads(attention_to(weights, visual), self.tp_group)

        def reference_at(positions: Tensor) -> Tensor:
            if state.reference is None:
                raise ValueError(f"{self.record.strategy} asks for a reference, but its plan names no reference layer")
            return gather_rows(state.select(group, state.reference), group.remaining.gather(1, positions - offset))

        def top(scores: Tensor) -> Tensor:
            ranked.append(self._checked("score", scores, visual.shape).float())
            return select_top(ranked[-1], keep)

        prior = None
        if state.prior is not None:
            # Up to the last visual token, both prompts are the same.
            positions = group.remaining.gather(1, group.visual)
            prior = state.select(group, state.prior)
            prior = prior.gather(2, positions[:, None].expand(-1, prior.shape[1], -1))
            prior = all_gather_heads(prior, self.tp_group)
        encoder = None
        if group.encoder:
            seen, keys, features = (gather_rows(tensor, group.original_index) for tensor in group.encoder)
            encoder = EncoderView(seen.transpose(1, 2), keys.transpose(1, 2), features)
        joint = None
        if group.joint:
            placed, asked = group.joint
            joint = JointView(gather_rows(placed, group.original_index), asked)
        return View(
            stage=stage,
            samples=tuple(group.samples),
            keep=keep,
            grids=group.grids,
            on_grid=group.on_grid,
            visual=visual,
            last=state.select(group, state.last_positions(hidden.shape[1])),
            question=shifted(group.text[:, -group.question_mask.shape[1] :]),
            asked=group.question_mask,
            features_at=lambda positions: gather_rows(state.select(group, hidden), positions),
            reference_at=reference_at,
            entered_at=entered_at,
            keys_at=keys_at,
            attention=attention,
            prior=prior,
            encoder=encoder,
            joint=joint,
            top=top,
            memo=group.memo,
        )

    def finish(self, states: Sequence[PrefillState], stages: list[Stage]) -> int:
        """Write a finished prefill into the record, and return how many of its samples have visual tokens.

        Args:
            states: The state of each part of the batch.
            stages: The prunes of the whole batch.

        Raises:
            ValueError: Features or scores are not finite, or a strategy selected other things than tokens in order.
        """
        if not reduce(and_, (state.finite for state in states)):
            raise ValueError(
                "the features of visual tokens or of what follows them are not finite, or scores of "
                f"{self.record.strategy} are NaN: look at the pictures, the weights and the options, or compute in "
                "bfloat16 or float32, which overflow later than float16"
            )
        if not reduce(and_, (state.selected for state in states)):
            raise ValueError(
                f"{self.record.strategy}: select() returned indices that are not in increasing order, or that are not "
                "those of visual tokens: return the sorted indices of different ones, from 0 to N - 1"
            )
        groups = [group for state in states for group in state.groups]
        visual = [group.num_visual for group in groups for _ in group.samples if group.num_visual]
        self.record.add_stages(sum(len(state.real) for state in states), visual, stages)
        for state in states:
            lengths = [state.length_after(state.prunes_before(number)) for number in range(self.record.depth)]
            self.meter.prefill(len(state.real), lengths)
        return len(visual)
