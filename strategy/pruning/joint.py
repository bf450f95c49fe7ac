"""The joint space of pictures and texts: where it has the visual tokens and the questions of new prompts."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from strategy.backbone import Backbone, JointSpace
from strategy.base import Strategy
from strategy.metrics.meter import CostMeter
from strategy.metrics.thread_state import ThreadState
from strategy.pruning.state import PrefillState


class _Current(ThreadState):
    """The questions of the prompts that a thread is about to run."""

    questions: Sequence[str] | None = None


class JointPlacer:
    """Places visual tokens, as the vision tower's layer saw them, and questions in the joint space of a CLIP model.

    Args:
        space: The space.
        strategy: The name of the strategy that wants it.
        meter: Counts it as scoring.
    """

    def __init__(self, space: JointSpace, strategy: str, meter: CostMeter) -> None:
        self.space, self.strategy, self.meter = space, strategy, meter
        self.current = _Current()

    @classmethod
    def of(
        cls, strategy: Strategy | None, model: nn.Module, backbone: Backbone, meter: CostMeter
    ) -> JointPlacer | None:
        """Return what places tokens for a strategy; None for one that wants no joint space.

        Raises:
            ValueError: The strategy wants one, and there is none; and as for `Backbone.joint_space`.
        """
        if strategy is None or strategy.clip_text is None:
            return None
        name, source = strategy.config.strategy, strategy.clip_text
        space = backbone.joint_space(model, source)
        if space is None:
            raise ValueError(
                f"{name}: clip_text={source!r}, but the backbone {backbone.name} knows no CLIP model of its vision "
                "tower (Backbone.joint_space): omit clip_text"
            )
        return cls(space, name, meter)

    def read(self, questions: Sequence[str] | None) -> None:
        """Keep the questions of the prompts that come next, until `assign`."""
        self.current.questions = questions

    def assign(self, state: PrefillState) -> None:
        """Give each group of new prompts its visual tokens and its questions in the joint space.

        Raises:
            ValueError: The questions are not known.
        """
        questions, self.current.questions = self.current.questions, None
        if questions is None:
            raise ValueError(
                f"{self.strategy} compares pictures with the text of the question (clip_text), which is not known: "
                "give the prompts as token ids to a model that was loaded with its tokenizer"
            )
        device, clock = state.real.device, self.meter.record.clock
        since = clock.start(device)
        ids, lengths, texts = self.space.tokenize(questions)
        shapes = [tuple(group.encoder[2].shape) for group in state.groups if group.encoder]
        with torch.no_grad(), self.meter.scoring("joint", tuple(ids.shape), *shapes):
            pieces = self.space.embed(ids, lengths).to(device)
            total = pieces.new_zeros(len(questions), pieces.shape[1]).index_add(0, texts.to(device), pieces)
            mean = total / texts.bincount(minlength=len(questions)).to(device)[:, None]
            for group in state.groups:
                if group.encoder:
                    _, _, features = group.encoder
                    group.joint = self.space.align(features).to(device), mean[group.batch_index]
        clock.stop("scoring", since)
