"""Views by hand, for tests of a strategy without a model."""

import math
from typing import Any

import torch
from torch import Tensor

from strategy import Grid, View
from strategy.base import EncoderView, JointView
from strategy.kernels.selection import select_top


def view_of(
    features: Tensor,
    attention: Tensor,
    grids: tuple[Grid, ...] | None = None,
    keep: int = 1,
    stage: int = 0,
    on_grid: tuple[Tensor, ...] | None = None,
    reference: Tensor | None = None,
    words: Tensor | None = None,
    asked: Tensor | None = None,
    entered: Tensor | None = None,
    keys: Tensor | None = None,
    encoder: EncoderView | None = None,
    joint: JointView | None = None,
) -> View:
    """A stage of prompts of N visual tokens and R words behind them.

    features, reference: [G, N, C]; words: [G, R, C], the same at both layers. attention: [G, heads, R, N], what
    each word pays, the first one without the question too; asked: [G, R]. entered: [G, N, C], what the layer before
    was given; keys: [G, key heads, N + R, width]. encoder: what the tower saw; if not given, what the first word pays
    stands for the class token's attention, and the features for the tower's. joint: see `View`. The sequence is the
    visual tokens and then the words; all are on one row if no grids are given.
    """
    samples, count = features.shape[:2]
    rows = attention.shape[2]
    words = features.new_zeros(samples, rows, features.shape[2]) if words is None else words
    grids = ((1, 1, count),) if grids is None else grids
    ends = [sum(math.prod(grid) for grid in grids[: n + 1]) for n in range(len(grids))]

    sequence_keys = torch.cat([features, words], dim=1)[:, None]

    def picked(visual: Tensor) -> Any:
        sequence = torch.cat([visual, words], dim=1)
        return lambda at: sequence.take_along_dim(at[..., None], 1)

    return View(
        stage=stage,
        samples=tuple(range(samples)),
        keep=keep,
        grids=grids,
        on_grid=on_grid
        or tuple(torch.arange(end - math.prod(grid), end) for grid, end in zip(grids, ends, strict=True)),
        visual=torch.arange(count).expand(samples, -1),
        last=torch.full((samples, 1), count + rows - 1),
        question=torch.arange(count, count + rows).expand(samples, -1),
        asked=torch.ones(samples, rows, dtype=torch.bool) if asked is None else asked,
        features_at=picked(features),
        reference_at=picked(features if reference is None else reference),
        entered_at=picked(features if entered is None else entered),
        keys_at=lambda at: (sequence_keys if keys is None else keys).take_along_dim(at[:, None, :, None], 2),
        attention=lambda at: attention.take_along_dim((at - count)[:, None, :, None], 2),
        prior=attention[:, :, 0],
        top=lambda scores: select_top(scores, keep),
        memo={},
        encoder=encoder or EncoderView(attention[:, :, 0], features[:, None], features),
        joint=joint,
    )
