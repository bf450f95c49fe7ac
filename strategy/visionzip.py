"""VisionZip (CVPR 2025, arXiv 2412.04467): tokens that the encoder's class token attends to, and means."""

import torch
from torch import Tensor

from strategy.base import Strategy, View
from strategy.kernels.selection import most_alike, positions_of, select_top
from strategy.plan import Facts, Plan
from strategy.registry import register

CONTEXTUAL = 10, 64  # so many of so many kept tokens are targets of a merge


def targets(rest: Tensor, count: int) -> Tensor:
    """Return `count` of the tokens [G, R] at even steps, from the first on, [G, count]."""
    step = rest.shape[1] // count
    return rest[:, : step * count : step]


@register("visionzip")
class VisionZip(Strategy):
    """Dominant tokens by class attention, and contextual ones that the others are merged into (section 3).

    One stage before the first layer, 192 tokens: 162 by the class token's attention at the second last layer of the
    vision tower, and 30 at even steps among the rest. Each other token is merged into the contextual one most like it,
    by the cosine of that layer's keys, mean over heads. No question is needed. Choices: the class token, which the
    published code counts among the dominant ones, does not reach the decoder, so a patch takes its place; pictures of
    one prompt share the budget. There, the mean of what is merged is added to the contextual token in front of the
    projector; here, behind it, the two are averaged.
    """

    encoder_layer = -2

    def plan(self, facts: Facts) -> Plan:
        return self.plan_before_layers(facts, tokens=192)

    def select(self, view: View) -> Tensor:
        assert view.encoder is not None
        attention = view.encoder.attention.mean(1)
        few, many = CONTEXTUAL
        contextual = view.keep * few // many
        stays = torch.zeros_like(attention, dtype=torch.bool)
        stays = stays.scatter(1, select_top(attention, view.keep - contextual), True)
        if contextual:
            rest = positions_of(~stays, stays.shape[1] - view.keep + contextual)
            view.memo["targets"] = targets(rest, contextual)
            stays = stays.scatter(1, view.memo["targets"], True)
        return positions_of(stays, view.keep)

    def merge(self, view: View, kept: Tensor) -> Tensor | None:
        into = view.memo.pop("targets", None)
        if into is None:
            return None
        assert view.encoder is not None
        nearest = most_alike(view.encoder.keys.float().mean(1), into)
        itself = torch.arange(nearest.shape[1], device=kept.device) == kept[..., None]
        merged = (nearest[:, None] == kept[..., None]) & ~itself.any(1, keepdim=True)
        count = merged.sum(-1, keepdim=True)
        return torch.where(count > 0, (itself + merged / count.clamp(min=1)) / 2, itself.float())
