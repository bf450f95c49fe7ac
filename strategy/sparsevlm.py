"""SparseVLM (ICML 2025, arXiv 2410.04417): words that concern the picture rate its tokens, and some are recycled."""

from dataclasses import replace

import torch
from torch import Tensor

from strategy.base import Strategy, View, mean_of
from strategy.plan import Facts, Plan
from strategy.registry import register

# Tokens kept of LLaVA's 576 after each stage, for a mean of so many over the layers (the published code).
PUBLISHED = {192: (300, 200, 110), 128: (303, 110, 36), 64: (66, 30, 17)}
WEIGHTS = tuple(kept / 192 for kept in PUBLISHED[192])
LAYERS, DEPTH = (2, 6, 15), 32
RECYCLED = 0.3  # of the dropped tokens, the best rated
PER_CLUSTER = 10  # recycled tokens that become one
NEIGHBOURS = 5  # that tell how dense it is around a token


def raters(visual: Tensor, words: Tensor, asked: Tensor) -> Tensor:
    """Return which words rate, [G, R]: those at least as close to the picture as the mean word (equations 4 and 5).

    Args:
        visual: Visual tokens [G, N, C] as they enter the decoder.
        words: Words [G, R, C] as they enter the decoder.
        asked: [G, R], False at padding.
    """
    likeness = visual.float() @ words.float().transpose(1, 2)
    closeness = likeness.masked_fill(~asked[:, None], -torch.inf).softmax(-1).mean(1)
    mean = closeness.sum(1, keepdim=True) / asked.sum(1, keepdim=True)
    # Rounding must not leave words that are all as close without a rater.
    return asked & ((closeness >= mean) | (closeness == closeness.amax(1, keepdim=True)))


def distances(one: Tensor, other: Tensor) -> Tensor:
    """Return Euclidean distances [G, M, K] of features [G, M, C] and [G, K, C], exact where they are small."""
    return torch.cdist(one, other, compute_mode="donot_use_mm_for_euclid_dist")


def cluster_centres(features: Tensor, count: int) -> Tensor:
    """Return the `count` of M tokens that are dense and far from denser ones (density peaks), [G, count].

    Density is exp(-mean square distance of the nearest five), as in section 3.3.

    Args:
        features: [G, M, C].
        count: How many tokens.
    """
    distance = distances(features, features) / features.shape[-1] ** 0.5
    near = distance.topk(min(NEIGHBOURS, distance.shape[1]), largest=False).values
    density = (-near.square().mean(-1)).exp()
    order = torch.arange(density.shape[1], device=density.device)
    # Of equally dense tokens the first counts as the denser one; the published code adds noise instead.
    equal = density[:, None] == density[..., None]
    denser = (density[:, None] > density[..., None]) | (equal & (order < order[:, None]))
    apart = distance.masked_fill(~denser, torch.inf).amin(-1)
    apart = torch.where(apart.isinf(), distance.amax((1, 2))[:, None], apart)
    return (density * apart).sort(dim=1, descending=True, stable=True).indices[:, :count]


@register("sparsevlm")
class SparseVLM(Strategy):
    """The mean attention of the raters among the words, and recycling of what they rate next (section 3).

    Three stages, at layers 2, 6 and 15 of 32, and as deep a share of other depths. At each, the better rated
    30 % of the dropped tokens are clustered, ten to one, and a cluster's mean stands where its centre stood.
    Choices: recycled tokens count against the budget; raters are chosen once, before the first layer; the
    budgets are the published ones, not the rank of the attention matrix, which would be another number for
    every prompt.
    """

    def plan(self, facts: Facts) -> Plan:
        budget, layers = self.budget(tokens=192), self.prune_layers(facts, facts.as_deep(LAYERS, DEPTH))
        row = PUBLISHED.get(budget.tokens[0]) if budget.tokens and len(budget.tokens) == 1 else None
        unit = facts.nominal_tokens if facts.own_size else 1
        budget = replace(budget, weights=WEIGHTS, stages=row and tuple(kept / unit for kept in row))
        return Plan.resolve(layers, 0, budget, facts)

    def score(self, view: View) -> Tensor:
        if "raters" not in view.memo:
            view.memo["raters"] = raters(view.reference, view.reference_at(view.question), view.asked)
        rating = view.memo["raters"].float()
        scores = (view.attention(view.question).mean(1) * rating[..., None]).sum(1) / rating.sum(1, keepdim=True)
        order = scores.sort(dim=1, descending=True, stable=True).indices
        dropped = scores.shape[1] - view.keep
        pool = int(RECYCLED * dropped) + 1
        clusters = min(pool // PER_CLUSTER + 1, view.keep - 1)
        best, candidates = order[:, : view.keep - clusters], order[:, view.keep - clusters :][:, :pool]
        # Attention is at most 1: the best rated come first, then the centres, then the others.
        scores = scores.scatter_add(1, best, torch.full_like(scores, 2))
        if clusters:
            features = view.features_at(view.visual.gather(1, candidates)).float()
            centres = cluster_centres(features, clusters)
            apart = distances(features, features.take_along_dim(centres[..., None], 1))
            nearest = centres.gather(1, apart.sort(dim=-1, stable=True).indices[..., 0])
            nearest = nearest.scatter(1, centres, centres)  # also where two centres are equal
            scores = scores.scatter_add(1, candidates.gather(1, centres), torch.ones_like(scores))
            itself = torch.arange(scores.shape[1], device=scores.device).expand_as(order)
            view.memo["into"] = itself.scatter(1, candidates, candidates.gather(1, nearest))
        return scores

    def merge(self, view: View, kept: Tensor) -> Tensor | None:
        into = view.memo.pop("into", None)
        return None if into is None else mean_of(into, kept)
