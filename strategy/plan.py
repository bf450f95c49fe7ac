"""Where a strategy prunes and how much each stage keeps."""

import bisect
import itertools
import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass

Grid = tuple[int, int, int]
"""Frames, rows and columns of the visual tokens of one image (one frame) or video."""


@dataclass(frozen=True)
class Facts:
    """What a strategy may know of the decoder that it plans for.

    Attributes:
        depth: Number of layers.
        nominal_tokens: The visual tokens that a budget in tokens is counted against.
        own_size: Whether a budget means a share of each sample's own tokens, whose number varies from image to image,
            instead of a number out of the nominal tokens.
        video: Whether the tokens are those of a video's frames.
        pair_cost: The cost of attention between two tokens of a layer, in units of what one token costs there.
        attention_layers: The layers whose attention strategies can ask for; None for all.
    """

    depth: int
    nominal_tokens: int
    own_size: bool = False
    video: bool = False
    pair_cost: float = 0.0
    attention_layers: tuple[int, ...] | None = None

    def as_deep(self, layers: Sequence[int], depth: int) -> tuple[int, ...]:
        """Return the layers as deep a share of this decoder as some are of `depth`, from 1 on and each a later one."""
        found: list[int] = []
        for layer in layers:
            found.append(max((found[-1] if found else 0) + 1, round(layer * self.depth / depth)))
        return tuple(found)

    def nearest_stages(self, layers: tuple[int, ...]) -> tuple[int, ...]:
        """Return the layers to prune at that are nearest to some, and have attention to rank by just before them.

        Where no layer has any, these stay: then whoever asks for attention is told so.

        Raises:
            ValueError: The decoder has not as many.
        """
        if not self.attention_layers or all(layer - 1 in self.attention_layers for layer in layers):
            return layers
        allowed = [number + 1 for number in self.attention_layers if number + 1 < self.depth]
        if len(allowed) < len(layers):
            raise ValueError(
                f"of {self.depth} layers only {list(self.attention_layers)} have attention to rank by, so that there "
                f"is no place for {len(layers)} default stages: give prune_layer out of {allowed} (and one number a "
                "stage)"
            )
        moved = min(
            itertools.combinations(allowed, len(layers)),
            key=lambda chosen: sum(abs(one - other) for one, other in zip(chosen, layers, strict=True)),
        )
        warnings.warn(
            f"pruning at {list(moved)} in place of {list(layers)}, since only the layers {list(self.attention_layers)} "
            "have attention to rank by",
            stacklevel=2,
        )
        return moved


@dataclass(frozen=True)
class StageBudgets:
    """A budget as the user gave it, and what part of it each stage keeps.

    A single stage keeps one value as it is. With several stages, one value is multiplied by each weight, or replaced by
    `stages`; several values must be one for each stage.

    Attributes:
        tokens: The budget in tokens, or None.
        ratio: The budget as a ratio, or None.
        weights: What each stage keeps, in units of a single value.
        stages: What each stage keeps instead: numbers of tokens, or shares of a sample's own tokens with
            `Facts.own_size`.
        basis: See `VTRConfig.budget_basis`.
    """

    tokens: tuple[int, ...] | None
    ratio: tuple[float, ...] | None
    weights: tuple[float, ...] = (1.0,)
    stages: tuple[float, ...] | None = None
    basis: str = "stages"


@dataclass(frozen=True)
class Plan:
    """Where to prune and how much to keep.

    Attributes:
        layers: Pruning at K happens right after layer K - 1, counted from 0; pruning at 0 happens before the first
            layer.
        reference: The layer whose input a strategy sees as `View.reference`, or None.
        budgets: One for each stage.
        shares: Whether the budgets are shares of a sample's own visual tokens; otherwise they are numbers of tokens.
    """

    layers: tuple[int, ...]
    reference: int | None
    budgets: tuple[float, ...]
    shares: bool

    @classmethod
    def resolve(
        cls, layers: tuple[int, ...], reference: int | None, budget: StageBudgets, facts: Facts, earliest: int = 1
    ) -> "Plan":
        """Turn a budget into one number for each stage.

        Args:
            layers: The layers to prune at.
            reference: The layer whose input is the reference, or None.
            budget: What the user gave, or the strategy's default.
            facts: What is known of the decoder.
            earliest: The first layer that such a strategy can prune at; 0 for a strategy that uses nothing of the layer
                before the prune.

        Raises:
            ValueError: Layers or budget do not fit the decoder.
        """
        if layers[0] < earliest:
            raise ValueError(
                f"prune_layer={list(layers)}: this strategy prunes at {earliest} at the earliest; only strategies that "
                "use no attention, nor anything else of the layer before, can prune at layer 0"
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
        """Return how many of a sample's `count` visual tokens are left after each stage; at least one."""
        left, kept = count, []
        for budget in self.budgets:
            left = min(left, max(1, math.floor(budget * count if self.shares else budget)))
            kept.append(left)
        return tuple(kept)


def _scaled(
    values: tuple[float, ...], layers: tuple[int, ...], target: float, basis: str, facts: Facts
) -> tuple[float, ...]:
    """Scale what the stages keep by the one factor that makes the mean layer cost what `target` tokens cost."""
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
