"""Parts of a batch whose prompts show pictures of the same sizes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from strategy.graph.bucketing import padded_length
from strategy.plan import Plan
from strategy.pruning.state import PrefillState, SampleGroup


class AlikePrompts(NamedTuple):
    """Prompts of a batch with the same grids.

    rows: Their numbers in the batch, [G]. length: Of each, padded at its end. pruned: How many visual tokens each
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
        """Return how many slots of a cache are written for each prompt, padding included."""
        return self.length - self.pruned


def split_batch(state: PrefillState, lengths: Sequence[int], plan: Plan | None) -> list[AlikePrompts]:
    """Return the parts of a batch.

    Args:
        state: The state of all prompts, before the first prune.
        lengths: Of the prompts without padding.
        plan: Where visual tokens are pruned; None if they are not.
    """
    parts = []
    for group in state.groups:
        pruned = group.num_visual - plan.kept(group.num_visual)[-1] if plan else 0
        length, own = state.real.shape[1], state
        if len(state.groups) > 1:
            # Where only padding follows a picture, one token of it stands for the question.
            least = length - group.question_mask.shape[1] + 1
            # Costs are counted anew for each length, so lengths are padded to few.
            longest = padded_length(max(lengths[sample] for sample in group.samples))
            length = max(least, min(longest, length))
            own = _state_of(state, group, length)
        parts.append(AlikePrompts(group.batch_index, length, pruned, own))
    return parts


def _state_of(state: PrefillState, group: SampleGroup, length: int) -> PrefillState:
    """Return the state, before the first prune, of a group whose prompts are no longer than `length`."""
    rows, cut = group.batch_index, state.real.shape[1] - length
    # What is cut off is padding, behind the last token of each prompt.
    question = group.question_mask[:, : group.question_mask.shape[1] - cut].clone()
    question[:, -1] |= ~question.any(1)
    own = replace(
        group,
        batch_index=torch.arange(len(rows), device=rows.device),
        remaining=group.remaining[:, :length],
        text=group.text[:, : length - group.num_visual].contiguous(),
        question_mask=question,
        memo={},
    )
    return PrefillState(
        [own],
        state.real[rows, :length],
        state.last[rows],
        rows_of(state.position, 0, rows),
        added=[tensor[rows, :length] for tensor in state.added],
        prior=None if state.prior is None else state.prior[rows, :, :length],
    )


def rows_of(tensor: Tensor, dim: int, rows: Tensor) -> Tensor:
    """Return the rows of a tensor along a dimension; all of it if that dimension holds one row for all."""
    return tensor if tensor.shape[dim] == 1 else tensor.index_select(dim, rows)
