"""EADP (ECCV 2026, arXiv 2607.02484): tokens that cover what the words with a clear place in the picture concern."""

import math

import torch
from torch import Tensor
from torch.nn.functional import normalize, pad

from strategy.base import Strategy, View
from strategy.kernels.selection import greedy_coverage, unit_range
from strategy.plan import Facts, Plan
from strategy.registry import register

ALPHA = 0.5  # weight of the mean word, against that of the words with the least entropy
BETA = 2  # power of the importance
WORDS_IN, SHARP, TEMPERATURE = 5, 100, 0.01  # one of so many words stays; factors of likeness and of entropy


def dense_likeness(likeness: Tensor, asked: Tensor) -> Tensor:
    """Return the likeness to the words with the least entropy over the tokens, [G, N].

    A fifth of the words stays, one at least, each weighted by the softmax of its negative entropy.

    Args:
        likeness: Of words and tokens, [G, R, N].
        asked: [G, R], False at padding.
    """
    share = (SHARP * likeness).softmax(dim=-1)
    entropy = -(share * (share + 1e-12).log()).sum(-1)
    order = entropy.masked_fill(~asked, torch.inf).sort(dim=1, stable=True).indices
    rank = torch.zeros_like(order).scatter(1, order, torch.arange(order.shape[1], device=order.device).expand_as(order))
    stays = rank < (asked.sum(1, keepdim=True) // WORDS_IN).clamp(min=1)
    weight = (-entropy / TEMPERATURE).masked_fill(~stays, -torch.inf).softmax(dim=1)
    return (weight[:, None] @ likeness)[:, 0]


def smooth(values: Tensor) -> Tensor:
    """Return values [G, T, H, W] after a Gaussian of 3 x 3 tokens with sigma 1, mirrored at the edges."""
    side = math.exp(-0.5)
    values = pad(values, (1, 1, 1, 1), mode="reflect")
    values = side * (values[:, :, :-2] + values[:, :, 2:]) + values[:, :, 1:-1]
    values = side * (values[..., :-2] + values[..., 2:]) + values[..., 1:-1]
    return values / (1 + 2 * side) ** 2


@register("eadp")
class EADP(Strategy):
    """The greedy maximum of coverage, in which each token counts by its importance to the question (section 3).

    One stage before the first layer, 128 tokens. Everything is seen in the space of the decoder's embeddings, as in the
    published code for the Qwens; that for LLaVA compares with CLIP's text features. A token's relevance is half that to
    the mean word and half that to the words of least entropy, see `dense_likeness`, both negative cosines, as published
    for either space; scaled to 0 ... 1 in each sample, smoothed on each grid and squared, it is the importance. A token
    covers another as far as (1 + cosine) / 2. Choices: the words are all tokens behind the picture, those of the
    template included; grids with a side under 2, and later stages, whose grid is broken, are not smoothed; pictures of
    one prompt share the budget.
    """

    def plan(self, facts: Facts) -> Plan:
        return self.plan_before_layers(facts, tokens=128)

    def importance(self, view: View, unit: Tensor) -> Tensor:
        """Return the importance [G, N] of visual tokens with features `unit` [G, N, C] of length one."""
        words = view.features_at(view.question).float().nan_to_num() * view.asked[..., None]
        mean = normalize(words.sum(1, keepdim=True), dim=-1)
        local = dense_likeness(-normalize(words, dim=-1) @ unit.transpose(1, 2), view.asked)
        relevance = (1 - ALPHA) * local - ALPHA * (mean @ unit.transpose(1, 2))[:, 0]
        relevance = unit_range(relevance)
        for grid, tokens in zip(view.grids, view.on_grid, strict=True):
            if view.stage == 0 and min(grid[1:]) > 1:
                smoothed = smooth(relevance[:, tokens].unflatten(1, grid)).flatten(1)
                relevance = relevance.index_copy(1, tokens, smoothed)
        return relevance**BETA

    def select(self, view: View) -> Tensor:
        # A feature that is not finite has no direction; the engine finds it on the features.
        unit = normalize(view.features.float(), dim=-1).nan_to_num()
        likeness = (1 + unit @ unit.transpose(1, 2)) / 2
        weighted = likeness * self.importance(view, unit)[:, None]
        return greedy_coverage(weighted, torch.ones_like(weighted[:, 0]), view.keep).sort(dim=1).values
