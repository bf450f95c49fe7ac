"""What a strategy is told, and what it must answer."""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from strategy.config import VTRConfig

Grid = tuple[int, int, int]
"""Frames, rows and columns of the visual tokens of one image (one frame) or video."""


@dataclass(frozen=True)
class Facts:
    """What a strategy may know of the decoder it plans for.

    depth: number of layers. nominal_tokens: the visual tokens a budget in tokens is counted against.
    own_size: whether a budget means a share of each sample's own tokens (their number varies from image
    to image) rather than so many of the nominal ones. video: whether the tokens are a video's frames.
    """

    depth: int
    nominal_tokens: int
    own_size: bool = False
    video: bool = False


@dataclass(frozen=True)
class StageBudgets:
    """A budget as the user gave it, in tokens or as a ratio, and what part of it each stage keeps.

    One number is taken times each weight; several must be one a stage.
    """

    tokens: tuple[int, ...] | None
    ratio: tuple[float, ...] | None
    weights: tuple[float, ...] = (1.0,)


@dataclass(frozen=True)
class Plan:
    """Where to prune and how much to keep.

    layers: pruning at K happens right after layer K - 1 (counted from 0). reference: the layer whose
    input a strategy sees as `View.reference`, or None. budgets: one a stage, shares of a sample's own
    visual tokens if `shares`, else numbers of tokens.
    """

    layers: tuple[int, ...]
    reference: int | None
    budgets: tuple[float, ...]
    shares: bool

    @classmethod
    def resolve(cls, layers: tuple[int, ...], reference: int | None, budget: StageBudgets, facts: Facts) -> "Plan":
        """Turn a budget into one number a stage; ValueError for what does not fit the decoder."""
        if layers[-1] >= facts.depth:
            raise ValueError(f"prune_layer={list(layers)}: the decoder has {facts.depth} layers, so below that")
        if reference is not None and reference >= layers[0]:
            raise ValueError(f"ref_layers={reference}: allowed is a layer below the first pruned one, {layers[0]}")
        name, given = ("keep_tokens", budget.tokens) if budget.tokens else ("retain_ratio", budget.ratio)
        values: tuple[float, ...] = given or ()
        if facts.own_size and budget.tokens:
            values = tuple(value / facts.nominal_tokens for value in values)
        elif not facts.own_size and budget.ratio:
            values = tuple(math.floor(value * facts.nominal_tokens) for value in values)
        if len(values) == 1:
            values = tuple(weight * values[0] for weight in budget.weights)
        if len(values) != len(layers):
            raise ValueError(
                f"{name}={list(given or ())}: want one number for each of the {len(layers)} stages, "
                f"which prune at {list(layers)}"
            )
        return cls(layers, reference, values, shares=facts.own_size)

    def kept(self, count: int) -> tuple[int, ...]:
        """How many of a sample's `count` visual tokens are left after each stage; at least one."""
        left, kept = count, []
        for budget in self.budgets:
            left = min(left, max(1, math.floor(budget * count if self.shares else budget)))
            kept.append(left)
        return tuple(kept)


@dataclass(frozen=True)
class View:
    """What a strategy sees at one stage: G samples with the same grids and so many visual tokens, N.

    stage: counted from 0. grids: of the images and videos of a sample, in order. on_grid: for each grid
    which of the N tokens lie on it, [T * H * W], row by row; at stage 0 only, before anything is gone.
    Class tokens lie on none. features: [G, N, C], the tokens as the layer before the
    prune left them. reference: [G, N, C], the same tokens at the plan's reference layer.
    last: [G, 1], the sequence index of the last prompt token. attention(rows): the float32 attention
    [G, heads, R, N] that the tokens at sequence indices `rows` [G, R] pay the visual tokens, after the
    softmax over everything they may see; it is computed when called for, for these rows only.
    """

    stage: int
    grids: tuple[Grid, ...]
    on_grid: tuple[Tensor, ...]
    features: Tensor
    reference: Tensor | None
    last: Tensor
    attention: Callable[[Tensor], Tensor]


class Strategy(ABC):
    """Scores visual tokens; it never sees a model."""

    def __init__(self, config: VTRConfig) -> None:
        self.config = config

    @abstractmethod
    def plan(self, facts: Facts) -> Plan:
        """Where to prune and how much to keep in such a decoder; ValueError where that cannot be."""

    @abstractmethod
    def score(self, view: View) -> Tensor:
        """Score the visual tokens as float32 [G, N]; the highest stay, of equal ones the first."""
