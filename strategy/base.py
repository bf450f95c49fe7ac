"""What a strategy is told, and what it must answer."""

import bisect
import itertools
import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

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
    pair_cost: what attention between two tokens of a layer costs, in units of what one token costs there.
    """

    depth: int
    nominal_tokens: int
    own_size: bool = False
    video: bool = False
    pair_cost: float = 0.0


@dataclass(frozen=True)
class StageBudgets:
    """A budget as the user gave it, in tokens or as a ratio, and what part of it each stage keeps.

    One number is what a single stage keeps. Of several it is taken times each weight, or stands for `stages`, numbers
    of tokens (shares of a sample's own ones for `Facts.own_size`); several numbers must be one a stage. basis: see
    `VTRConfig`.
    """

    tokens: tuple[int, ...] | None
    ratio: tuple[float, ...] | None
    weights: tuple[float, ...] = (1.0,)
    stages: tuple[float, ...] | None = None
    basis: str = "stages"


@dataclass(frozen=True)
class Plan:
    """Where to prune and how much to keep.

    layers: pruning at K happens right after layer K - 1 (counted from 0), at 0 before the first layer.
    reference: the layer whose input a strategy sees as `View.reference`, or None. budgets: one a stage,
    shares of a sample's own visual tokens if `shares`, else numbers of tokens.
    """

    layers: tuple[int, ...]
    reference: int | None
    budgets: tuple[float, ...]
    shares: bool

    @classmethod
    def resolve(
        cls, layers: tuple[int, ...], reference: int | None, budget: StageBudgets, facts: Facts, earliest: int = 1
    ) -> "Plan":
        """Turn a budget into one number a stage; ValueError for what does not fit the decoder.

        earliest: the first layer such a strategy can prune at; 0 for one that asks for no attention.
        """
        if layers[0] < earliest:
            raise ValueError(
                f"prune_layer={list(layers)}: this strategy prunes at {earliest} at the earliest; before the first "
                "layer only one can that asks for no attention"
            )
        if layers[-1] >= facts.depth:
            raise ValueError(f"prune_layer={list(layers)}: the decoder has {facts.depth} layers, so below that")
        if any(later <= earlier for earlier, later in itertools.pairwise(layers)):
            raise ValueError(
                f"a decoder of {facts.depth} layers is too shallow for {len(layers)} stages: give prune_layer "
                "(and one number a stage) yourself"
            )
        if reference is not None and reference >= layers[0]:
            raise ValueError(f"ref_layers={reference}: allowed is a layer below the first pruned one, {layers[0]}")
        name, given = ("keep_tokens", budget.tokens) if budget.tokens else ("retain_ratio", budget.ratio)
        values: tuple[float, ...] = given or ()
        if facts.own_size and budget.tokens:
            values = tuple(value / facts.nominal_tokens for value in values)
        elif not facts.own_size and budget.ratio:
            values = tuple(math.floor(value * facts.nominal_tokens) for value in values)
        single = values[0] if len(values) == 1 else None
        if single is not None and len(layers) > 1:
            values = budget.stages or tuple(weight * single for weight in budget.weights)
        if len(values) != len(layers):
            own = "" if single is None else f"; a single one is shared by {len(values)} only, as this strategy has them"
            raise ValueError(
                f"{name}={list(given or ())}: want one number for each of the {len(layers)} stages, "
                f"which prune at {list(layers)}{own}"
            )
        if budget.basis != "stages":
            if single is None:
                raise ValueError(f"{name}={list(given or ())}: budget_basis={budget.basis} wants one number")
            values = _scaled(values, layers, single, budget.basis, facts)
        return cls(layers, reference, values, shares=facts.own_size)

    def kept(self, count: int) -> tuple[int, ...]:
        """How many of a sample's `count` visual tokens are left after each stage; at least one."""
        left, kept = count, []
        for budget in self.budgets:
            left = min(left, max(1, math.floor(budget * count if self.shares else budget)))
            kept.append(left)
        return tuple(kept)


def _scaled(
    values: tuple[float, ...], layers: tuple[int, ...], target: float, basis: str, facts: Facts
) -> tuple[float, ...]:
    """What the stages keep, all times the one factor that makes a layer cost, on average, what `target` tokens cost."""
    unit = facts.nominal_tokens if facts.own_size else 1
    if target * unit >= facts.nominal_tokens:
        return (facts.nominal_tokens / unit,) * len(values)
    spans = [b - a for a, b in zip((0, *layers), (*layers, facts.depth), strict=True)]

    def cost(tokens: float) -> float:
        return tokens * (1 + facts.pair_cost * tokens) if basis == "flops" else tokens

    def mean(factor: float) -> float:
        left, costs = float(facts.nominal_tokens), []
        for value in (math.inf, *values):
            left = min(left, factor * value * unit if value < math.inf else left)
            costs.append(cost(left))
        return sum(span * each for span, each in zip(spans, costs, strict=True)) / facts.depth

    if mean(0) > cost(target * unit):
        raise ValueError(
            f"budget_basis={basis}: a decoder of {facts.depth} layers that prunes at {list(layers)} costs more than "
            f"{target:g}{' of the' if facts.own_size else ''} visual tokens would at every layer, whatever the stages "
            "keep: raise the budget or prune earlier"
        )
    steps = 1 << 24
    most = facts.nominal_tokens / unit / min(values)
    factor = bisect.bisect_right(range(steps), cost(target * unit), key=lambda step: mean(most * step / steps)) / steps
    return tuple(factor * most * value for value in values)


@dataclass(frozen=True)
class View:
    """What a strategy sees at one stage: G samples with the same grids and so many visual tokens, N.

    stage: counted from 0. samples: their numbers in the batch. keep: how many of the N will stay. grids: of
    the images and videos of a sample, in order. on_grid: for each grid which of the N tokens lie on it,
    [T * H * W], row by row; at stage 0 only, before anything is gone. Class tokens lie on none. memo: the
    strategy's own, kept from one stage to the next of the same samples.

    Sequence indices, in the sequence as it is now: visual: [G, N]. last: [G, 1], the last prompt token. question:
    [G, R], the tokens behind the last visual one; asked: [G, R], False for those of them that only fill up
    what is shorter.

    features_at(rows), reference_at(rows): [G, R, C], the tokens at sequence indices [G, R] as the layer before
    the prune left them, and as they entered the plan's reference layer. attention(rows): the float32 attention
    [G, heads, R, N] that these tokens pay the visual ones, after the softmax over everything they may see, with all
    heads, also where they are split over processes.
    All three are computed when called for, for these rows only. prior: [G, heads, N], the attention that the last
    token of the prompt without its question pays them before the first stage, for a strategy that is
    `question_free`; else None.
    """

    stage: int
    samples: tuple[int, ...]
    keep: int
    grids: tuple[Grid, ...]
    on_grid: tuple[Tensor, ...]
    visual: Tensor
    last: Tensor
    question: Tensor
    asked: Tensor
    features_at: Callable[[Tensor], Tensor]
    reference_at: Callable[[Tensor], Tensor]
    attention: Callable[[Tensor], Tensor]
    memo: dict[str, Tensor]
    prior: Tensor | None = None

    @cached_property
    def features(self) -> Tensor:
        """The visual tokens as the layer before the prune left them, [G, N, C]."""
        return self.features_at(self.visual)

    @cached_property
    def reference(self) -> Tensor:
        """The visual tokens as they entered the plan's reference layer, [G, N, C]."""
        return self.reference_at(self.visual)


def mean_of(into: Tensor, kept: Tensor) -> Tensor:
    """Weights [G, K, N], see `Strategy.merge`, that make each kept token the mean of those that go into it.

    into: [G, N], the token that each goes into; those that go into none of `kept` [G, K] are dropped.
    """
    weights = (into[:, None] == kept[..., None]).float()
    return weights / weights.sum(-1, keepdim=True)


class Strategy(ABC):
    """Scores visual tokens; it never sees a model.

    question_free: whether it wants `View.prior`, for which the layers before the first stage run twice.
    """

    question_free = False

    def __init__(self, config: VTRConfig) -> None:
        self.config = config

    @abstractmethod
    def plan(self, facts: Facts) -> Plan:
        """Where to prune and how much to keep in such a decoder; ValueError where that cannot be."""

    @abstractmethod
    def score(self, view: View) -> Tensor:
        """Score the visual tokens as float32 [G, N]; the highest stay, of equal ones the first."""

    def merge(self, view: View, kept: Tensor) -> Tensor | None:
        """What of each token the features of the kept ones become sums of, as weights [G, K, N].

        kept: [G, K], which of the N stay, in order. None, as here, leaves them as they are.
        """
        return None

    def budget(self, tokens: int | None = None, ratio: float | None = None) -> StageBudgets:
        """The configured budget; where none is, the default given here, in tokens or else as a ratio."""
        if (tokens is None) == (ratio is None):
            raise ValueError(f"budget(tokens={tokens}, ratio={ratio}): give one of the two as the default")
        config = self.config
        given = config.keep_tokens, config.retain_ratio
        if not any(given):
            given = (None if tokens is None else (tokens,)), (None if ratio is None else (ratio,))
        return StageBudgets(*given, basis=config.budget_basis)
