"""VisPruner (ICCV 2025, arXiv 2412.01818): tokens that the encoder attends to, and others that differ."""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import normalize

from strategy.base import Strategy, View
from strategy.options import Options, between, option
from strategy.plan import Facts, Plan
from strategy.registry import register

REMOVED = 8  # tokens in each turn


def most_distinct(features: Tensor, order: Tensor, count: int) -> Tensor:
    """Remove duplicates in turns until `count` tokens are left, [G, count].

    In each turn every second token, from the first on, is compared with all tokens between them; the up to eight that
    are most like one of those are removed, of equal ones the first. What is left of them, most alike first, then comes
    before the others.

    Args:
        features: [G, N, C].
        order: The tokens to begin with, [G, R], in the order in which they alternate.
        count: How many stay.
    """
    if not count:
        return order[:, :0]
    # A feature that is not finite has no direction; the engine finds it on the features.
    unit = normalize(features.float(), dim=-1).nan_to_num()
    while order.shape[1] > count:
        removed = min(REMOVED, order.shape[1] - count)
        one, other = order[:, ::2], order[:, 1::2]
        first, second = (unit.take_along_dim(tokens[..., None], 1) for tokens in (one, other))
        likeness = (first @ second.transpose(1, 2)).amax(-1)
        alike = likeness.sort(dim=1, descending=True, stable=True).indices
        order = torch.cat([one.gather(1, alike[:, removed:]), other], dim=1)
    return order


@dataclass(frozen=True, init=False)
class VisPrunerOptions(Options):
    """The options of VisPruner."""

    important_ratio: float = option(
        0.5, between(0, 1), "Share of the kept tokens that are chosen by attention, from 0 to 1."
    )


@register("vispruner")
class VisPruner(Strategy):
    """Half of the tokens by class attention, half by removing the most similar of the rest in turns (section 3).

    One stage before the first layer, 192 tokens. Attention and features are those of the second last layer of the
    vision tower, the former as the mean over heads. The rest takes part in falling order of its attention, as in the
    published code. No question is needed. Pictures of one prompt share the budget. One swap of neighbours in that
    order changes all turns that follow, so that which of tokens that are alike stay turns on rounding.
    """

    options_type = VisPrunerOptions
    encoder_layer = -2

    def plan(self, facts: Facts) -> Plan:
        return self.plan_before_layers(facts, tokens=192)

    def select(self, view: View) -> Tensor:
        assert view.encoder is not None
        order = view.encoder.attention.mean(1).sort(dim=1, descending=True, stable=True).indices
        important = int(view.keep * self.options.important_ratio)
        diverse = most_distinct(view.encoder.features, order[:, important:], view.keep - important)
        return torch.cat([order[:, :important], diverse], dim=1).sort(dim=1).values
