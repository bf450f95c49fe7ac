"""HoloV (NeurIPS 2025, arXiv 2510.02912): every crop of the picture keeps its best tokens, attended crops more."""

import torch
from torch import Tensor
from torch.nn.functional import normalize

from strategy.base import Strategy, View
from strategy.kernels.selection import best_of_groups, positions_of, share_out
from strategy.plan import Facts, Plan
from strategy.registry import register

CROPS = 16
BETA = 0.09  # weight of the variance
EPS = 1e-6


def crops(count: int, number: int, device: torch.device) -> Tensor:
    """Return the crop of each of `count` tokens, [count]: slices in order, the first ones longer by one if need be."""
    size, longer = divmod(count, number)
    at = torch.arange(count, device=device)
    return torch.where(at < longer * (size + 1), at // (size + 1), longer + (at - longer * (size + 1)) // size)


def holistic_score(features: Tensor, attention: Tensor, crop: Tensor) -> Tensor:
    """Return attention plus the variance of a token's cosine with the others of its crop, [G, N].

    The variance is scaled so that its mean in a crop is 0.09 times that of the attention.

    Args:
        features: [G, N, C].
        attention: [G, N], not negative.
        crop: [N], the number of each token's crop.
    """
    # A feature that is not finite has no direction; the engine finds it on the features.
    unit = normalize(features.float(), dim=-1).nan_to_num()
    same = crop[:, None] == crop
    others = same & ~torch.eye(len(crop), dtype=torch.bool, device=crop.device)
    number = others.sum(-1).clamp(min=1)
    likeness = (unit @ unit.transpose(1, 2)) * others
    spread = (likeness - likeness.sum(-1, keepdim=True) / number[:, None]) * others
    variance = spread.square().sum(-1) / number
    means = [each @ same.float() / same.sum(-1) for each in (attention, variance)]
    return attention + BETA * variance * means[0] / (means[1] + EPS)


@register("holov")
class HoloV(Strategy):
    """The budget is shared over 16 crops by their mean score, and each keeps its tokens with the highest (section 3).

    One stage before the first layer, 192 tokens. A token's score is the attention of the class token at the second last
    layer of the vision tower, mean over heads, plus a part for the variance of its likeness to others, see
    `holistic_score`; likeness is that of projected features. A crop is a slice of the tokens row by row, as in the
    published code: on LLaVA 36 tokens, one row and a half; pictures of one prompt are one sequence. Of the tokens that
    rounding down leaves over each goes to another crop, the highest score first; what a crop has no room for goes to
    the first of that order. No question is needed. Choices: inside a crop the published code ranks by attention alone,
    and it counts a token's likeness to itself as zero in its variance; here, that is left out.
    """

    encoder_layer = -2

    def plan(self, facts: Facts) -> Plan:
        return self.plan_before_layers(facts, tokens=192)

    def select(self, view: View) -> Tensor:
        assert view.encoder is not None
        attention = view.encoder.attention.mean(1)
        samples, count = attention.shape
        crop = crops(count, min(CROPS, count), attention.device)
        scores = holistic_score(view.features, attention, crop)
        inside = crop[:, None] == torch.arange(min(CROPS, count), device=crop.device)
        size = inside.sum(0)
        weight = scores @ inside.float() / size
        weight = weight / (weight.sum(1, keepdim=True) + EPS * EPS)
        # Rounding must not take a token from crops whose share is a whole number.
        wanted = (weight * view.keep + 1e-4).floor().long()
        first = weight.sort(dim=1, descending=True, stable=True).indices
        left = view.keep - wanted.sum(1, keepdim=True)
        wanted = wanted.scatter_add(1, first, (torch.arange(len(size), device=crop.device) < left).long())
        quota = share_out(wanted, size.expand(samples, -1), first, view.keep)
        return positions_of(best_of_groups(scores, crop.expand(samples, -1), quota), view.keep)
