"""What a strategy sees, and what it returns."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar

from torch import Tensor

from strategy.config import VTRConfig
from strategy.options import Options
from strategy.plan import Facts, Grid, Plan, StageBudgets

__all__ = ["EncoderView", "Facts", "Grid", "JointView", "Plan", "StageBudgets", "Strategy", "View", "mean_of"]


@dataclass(frozen=True)
class EncoderView:
    """What a layer of the vision tower saw of the N visual tokens of G samples.

    Attributes:
        attention: What the class token of their picture pays them, after the softmax over everything it sees, float32
            [G, heads, N]. In a tower without a class token, what all patches pay them, in sum, so that a patch of a
            picture or window of any size is paid 1 on average.
        keys: Their keys in that layer, without a rotary embedding, [G, heads, N, head width].
        features: The layer's output, [G, N, C], which no projector has changed.

    Of a token that the projector makes of several patches, each is the mean of theirs.
    """

    attention: Tensor
    keys: Tensor
    features: Tensor


@dataclass(frozen=True)
class JointView:
    """Where the joint space of a CLIP model's pictures and texts has what G samples show and ask.

    Attributes:
        visual: The N visual tokens, [G, N, D], float32, of any length.
        question: The questions, [G, D], float32: the mean of vectors of length 1, one for each piece of a text that is
            too long for the text tower.
    """

    visual: Tensor
    question: Tensor


@dataclass(frozen=True)
class View:
    """What a strategy sees at one stage: G samples with the same grids and N visual tokens each.

    Features and attention are computed when a strategy calls for them, and only for the rows it asks for.

    Attributes:
        stage: The stage, counted from 0.
        samples: The numbers of the samples in the batch. With engine=graph, do not compute with them: a CUDA graph that
            was captured for some samples is replayed for others.
        keep: How many of the N tokens will stay.
        grids: The grids of the images and videos of a sample, in order.
        on_grid: For each grid, which of the N tokens lie on it, [T * H * W], row by row. Class tokens lie on none. At
            later stages, where the grid is broken, the tuple is the same and does not apply.
        visual: Sequence indices [G, N] of the visual tokens, in the sequence at this stage.
        last: Sequence index [G, 1] of the last prompt token.
        question: Sequence indices [G, R] of the tokens behind the last visual one.
        asked: [G, R], False at padding among the question's tokens.
        features_at: Returns the hidden states [G, R, C] of tokens at sequence indices [G, R], as the layer before the
            prune left them.
        reference_at: Returns their hidden states as they entered the plan's reference layer.
        entered_at: Returns their hidden states as they entered the layer before the prune.
        keys_at: Returns the keys [G, key heads, R, head width] of that layer, with the rotary embedding, of tokens at
            sequence indices [G, R]; with all key heads, also where these are split over processes.
        attention: Returns the float32 attention [G, heads, R, N] that tokens at sequence indices [G, R] pay the visual
            tokens, after the softmax over everything they may see; with all heads, also where these are split over
            processes.
        top: Returns the indices [G, K], in order, of the `keep` highest of scores [G, N], of equal ones the first.
        memo: The strategy's own tensors, kept from `score` or `select` to `merge` and from one stage to the next of the
            same samples.
        prior: [G, heads, N], the attention that the last token of the prompt without its question pays the visual
            tokens before the first stage, for a strategy that is `question_free`; else None.
        encoder: What the vision tower saw, for a strategy with an `encoder_layer`; else None.
        joint: The joint space of pictures and texts, for a strategy with `clip_text`; else None.
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
    entered_at: Callable[[Tensor], Tensor]
    keys_at: Callable[[Tensor], Tensor]
    attention: Callable[[Tensor], Tensor]
    top: Callable[[Tensor], Tensor]
    memo: dict[str, Tensor]
    prior: Tensor | None = None
    encoder: EncoderView | None = None
    joint: JointView | None = None

    @cached_property
    def features(self) -> Tensor:
        """The visual tokens as the layer before the prune left them, [G, N, C]."""
        return self.features_at(self.visual)

    @cached_property
    def reference(self) -> Tensor:
        """The visual tokens as they entered the plan's reference layer, [G, N, C]."""
        return self.reference_at(self.visual)


def mean_of(into: Tensor, kept: Tensor) -> Tensor:
    """Return merge weights [G, K, N], see `Strategy.merge`, that make each kept token the mean of those merged into it.

    Args:
        into: [G, N], the token that each token is merged into; those merged into none of `kept` are dropped.
        kept: [G, K].
    """
    weights = (into[:, None] == kept[..., None]).float()
    return weights / weights.sum(-1, keepdim=True)


class Strategy(ABC):
    """Scores visual tokens, or selects some; it never sees a model.

    A strategy defines `plan`, and one of `score` and `select`.

    Attributes:
        options_type: The class of the strategy's own options, see `strategy.options`; `self.options` has their values.
        question_free: Whether the strategy wants `View.prior`, for which the layers before the first stage run twice.
        encoder_layer: The layer of the vision tower that the strategy wants to see as `View.encoder`; -1 is the last
            one. None for a strategy that does not look at the tower.
        clip_text: The CLIP model, a hub id or a folder, in whose joint space the strategy wants to see the visual
            tokens and the question as `View.joint`; the visual tokens are taken from `encoder_layer`. None for a
            strategy that wants none.
    """

    options_type: ClassVar[type[Options]] = Options
    question_free = False
    encoder_layer: int | None = None
    clip_text: str | None = None

    def __init__(self, config: VTRConfig) -> None:
        cls = type(self)
        if cls.score is Strategy.score and cls.select is Strategy.select:
            raise ValueError(f"{cls.__qualname__} defines neither score() nor select(): define one of the two")
        self.config = config
        self.options: Any = config.options

    @abstractmethod
    def plan(self, facts: Facts) -> Plan:
        """Return where to prune and how much to keep in such a decoder; ValueError where that is not possible."""

    def score(self, view: View) -> Tensor:
        """Score the visual tokens as float32 [G, N]; the highest stay, of equal scores the first."""
        raise NotImplementedError(f"{type(self).__qualname__} selects tokens without scores")

    def select(self, view: View) -> Tensor:
        """Return the indices [G, K], in order, of the K = `view.keep` of the N visual tokens that stay.

        The default takes those of the highest `score`. A method whose choice of one token depends on the others, such
        as a greedy one, overrides it.
        """
        return view.top(self.score(view))

    def merge(self, view: View, kept: Tensor) -> Tensor | None:
        """Return merge weights [G, K, N]: kept token k becomes sum_n weights[k, n] * features[n].

        Args:
            view: What `score` or `select` saw.
            kept: [G, K], which of the N tokens stay, in order.

        Returns:
            The weights; None, the default, leaves the features of the kept tokens as they are.
        """
        return None

    def prune_layers(self, facts: Facts, default: tuple[int, ...]) -> tuple[int, ...]:
        """Return the configured layers to prune at, or those with attention to rank by that are nearest to the default.

        Raises:
            ValueError: As for `Facts.nearest_stages`.
        """
        return self.config.prune_layer or facts.nearest_stages(default)

    def plan_before_layers(self, facts: Facts, tokens: int | None = None, ratio: float | None = None) -> Plan:
        """Return a plan with one stage before the first layer, or with the configured ones.

        Args:
            facts: What is known of the decoder.
            tokens, ratio: The default budget, one of the two, as for `budget`.

        Raises:
            ValueError: Layers or budget do not fit the decoder.
        """
        return Plan.resolve(self.config.prune_layer or (0,), None, self.budget(tokens, ratio), facts, earliest=0)

    def budget(self, tokens: int | None = None, ratio: float | None = None) -> StageBudgets:
        """Return the configured budget, or the default that is given here in tokens or as a ratio."""
        if (tokens is None) == (ratio is None):
            raise ValueError(f"budget(tokens={tokens}, ratio={ratio}): give one of the two as the default")
        config = self.config
        given = config.keep_tokens, config.retain_ratio
        if not any(given):
            given = (None if tokens is None else (tokens,)), (None if ratio is None else (ratio,))
        return StageBudgets(*given, basis=config.budget_basis)
