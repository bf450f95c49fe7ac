"""Which tokens stay, by their scores, and where they then are."""

import torch
from torch import Tensor

from strategy.fusing import fusable, is_fusing

PAIRS = 1 << 12  # tokens, up to which comparing all pairs in one fused operation is faster than to sort


def highest(scores: Tensor, count: int) -> Tensor:
    """The places [G, count], in order, of the highest scores [G, N]; of equal ones the first, on every device."""
    if is_fusing() and scores.shape[1] <= PAIRS:
        return places(ranks(scores) < count, count)
    # A stable sort breaks ties the same way everywhere, which top-k does not.
    order = scores.sort(dim=1, descending=True, stable=True).indices
    return places(torch.zeros_like(order, dtype=torch.bool).scatter_(1, order[:, :count], True), count)


@fusable
def ranks(scores: Tensor) -> Tensor:
    """How many of a row's scores [G, N] come before each one in a stable sort from high to low."""
    mine, other = scores[:, :, None], scores[:, None]
    at = torch.arange(scores.shape[1], device=scores.device)
    return ((other > mine) | ((other == mine) & (at < at[:, None]))).sum(-1)


@fusable
def places(mask: Tensor, count: int) -> Tensor:
    """The places [G, count], in order, where the rows of a mask [G, N] hold, each in `count` of them."""
    at = torch.where(mask, mask.cumsum(1) - 1, count)
    every = torch.arange(mask.shape[1], device=mask.device).expand_as(at)
    return at.new_zeros(len(at), count + 1).scatter(1, at, every)[:, :count]


@fusable
def narrowed(
    left: Tensor, number: Tensor, visual: Tensor, text: Tensor, chosen: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """What of a `Group` stays with the `chosen` [G, N'] of its visual tokens: the places, and its tensors there."""
    visual = visual.gather(1, chosen)
    there = torch.zeros_like(left, dtype=torch.bool).scatter(1, visual, True).scatter(1, text, True)
    stay = places(there, visual.shape[1] + text.shape[1])
    place = there.cumsum(1) - 1
    return stay, left.gather(1, stay), number.gather(1, chosen), place.gather(1, visual), place.gather(1, text)


@fusable
def sound(scores: Tensor, features: Tensor) -> Tensor:
    """Whether no score is NaN and all features are finite."""
    return ~scores.isnan().any() & features.isfinite().all()
