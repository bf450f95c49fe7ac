"""PruneSID (ICLR 2026, arXiv 2603.09480): the tokens of each principal component that differ, important ones first."""

import math

import torch
from torch import Tensor
from torch.nn.functional import normalize

from strategy.base import Strategy, View
from strategy.kernels.components import principal_axes
from strategy.kernels.selection import best_of_groups, first_maximum, positions_of, share_out
from strategy.plan import Facts, Plan
from strategy.registry import register

GROUP = 4  # kept tokens for each principal component
THRESHOLD = 32  # kept tokens for which a token suppresses those more like it than the mean
MOST, PER = 5, 64  # a group keeps five tokens at most for each 64 kept ones that have begun


def suppressed(likeness: Tensor, order: Tensor) -> Tensor:
    """Return which tokens a better one suppresses that is not suppressed itself, [G, N].

    Args:
        likeness: [G, N, N], whether two tokens are too much alike; none is too much like itself.
        order: [G, N], the tokens, best first.
    """
    gone = torch.zeros_like(order, dtype=torch.bool)
    for token in order.split(1, dim=1):
        gone = gone | (likeness.take_along_dim(token[..., None], 1)[:, 0] & ~gone.gather(1, token))
    return gone


def quotas(size: Tensor, distinct: Tensor, keep: int) -> Tensor:
    """Return how many tokens groups keep, [G, M]: one each, and of the rest shares by their distinct tokens.

    Args:
        size, distinct: Tokens of each group, and those that are not suppressed, [G, M].
        keep: How many tokens stay, at least M.
    """
    most = distinct.clamp(max=MOST * math.ceil(keep / PER))
    raised = torch.minimum(most[..., None] + torch.arange(keep, device=size.device), size[..., None])
    most = torch.minimum(most + (raised.sum(1) < keep).sum(1, keepdim=True), size)
    least = size.clamp(max=1)
    rest, total = keep - least.sum(1, keepdim=True), distinct.sum(1, keepdim=True)
    ends = (2 * distinct.cumsum(1) * rest + total) // (2 * total)
    first = distinct.sort(dim=1, descending=True, stable=True).indices
    return share_out(least + ends.diff(dim=1, prepend=torch.zeros_like(rest)), most, first, keep)


@register("prunesid")
class PruneSID(Strategy):
    """Groups of tokens by principal components, and in each group the attended tokens that differ (section 3).

    One stage before the first layer, 192 tokens. Everything is seen at the second last layer of the vision tower. The
    sigmoid of the features has a principal component for each four kept tokens; a token belongs to the one that it
    contributes most to. In a group, a token suppresses those that get less attention, as the sum over heads, and whose
    cosine with it is above K / 32 times the mean cosine of all tokens, for K kept ones; suppressed tokens come last.
    No question is needed. Choices: the iterations that find components have a fixed start, where those of the published
    code have a random one; a picture's budget does not depend on what it shows; the class token, which that code counts
    among the kept ones, does not reach the decoder; pictures of one prompt share the budget.
    """

    encoder_layer = -2

    def plan(self, facts: Facts) -> Plan:
        return self.plan_before_layers(facts, tokens=192)

    def select(self, view: View) -> Tensor:
        assert view.encoder is not None
        # A feature that is not finite has no direction; the engine finds it on the features.
        features, keep = view.encoder.features.float().nan_to_num(), view.keep
        number, count = max(1, keep // GROUP), features.shape[1]
        contents = features.sigmoid()
        axes = principal_axes(contents - contents.mean(-1, keepdim=True), number)
        group = first_maximum(axes.abs())[..., 0]
        itself = torch.eye(count, dtype=torch.bool, device=group.device)
        unit = normalize(features, dim=-1)
        likeness = (unit @ unit.transpose(1, 2)).masked_fill(itself, 0)
        mean = likeness.sum((1, 2), keepdim=True) / max(1, count * (count - 1))
        alike = (likeness > keep / THRESHOLD * mean) & (group[..., None] == group[:, None]) & ~itself
        order = view.encoder.attention.sum(1).sort(dim=1, descending=True, stable=True).indices
        gone = suppressed(alike, order)
        inside = group[..., None] == torch.arange(number, device=group.device)
        quota = quotas(inside.sum(1), (inside & ~gone[..., None]).sum(1), keep)
        rank = torch.arange(count, 0, -1, device=group.device).expand_as(order)
        scores = torch.zeros_like(order).scatter(1, order, rank) + count * ~gone
        return positions_of(best_of_groups(scores, group, quota), keep)
