"""Which tokens stay, by their scores, and where they then are."""

import torch
from torch import Tensor

from strategy.fusing import fusable, is_fusing

PAIRS = 1 << 12  # tokens, up to which comparing all pairs in one fused operation is faster than to sort


def highest(scores: Tensor, count: int) -> Tensor:
    """The places [G, count], in order, of the highest scores [G, N]; of equal ones the first, on every device."""
    if is_fusing() and scores.shape[1] <= PAIRS:
        return highest_of_pairs(scores, count)
    # A stable sort breaks ties the same way everywhere, which top-k does not.
    order = scores.sort(dim=1, descending=True, stable=True).indices
    return places(torch.zeros_like(order, dtype=torch.bool).scatter_(1, order[:, :count], True), count)


@fusable
def highest_of_pairs(scores: Tensor, count: int) -> Tensor:
    """`highest`, by counting how many of a row's scores come before each one in that sort."""
    mine, other = scores[:, :, None], scores[:, None]
    at = torch.arange(scores.shape[1], device=scores.device)
    before = ((other > mine) | ((other == mine) & (at < at[:, None]))).sum(-1)
    return places(before < count, count)


def places(mask: Tensor, count: int) -> Tensor:
    """The places [G, count], in order, where the rows of a mask [G, N] hold, each in `count` of them."""
    wanted = torch.arange(1, count + 1, device=mask.device).repeat(len(mask), 1)
    return torch.searchsorted(mask.cumsum(1), wanted)


@fusable
def narrowed(
    left: Tensor, number: Tensor, visual: Tensor, text: Tensor, chosen: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """What of a `Group` stays with the `chosen` [G, N'] of its visual tokens: the places, and its tensors there."""
    visual = visual.gather(1, chosen)
    # Two sorted lists become one: each of the others that is smaller moves a place on by one.
    visual_at = torch.searchsorted(text, visual) + torch.arange(visual.shape[1], device=left.device)
    text_at = torch.searchsorted(visual, text) + torch.arange(text.shape[1], device=left.device)
    at = torch.arange(visual.shape[1] + text.shape[1], device=left.device).repeat(len(left), 1)
    before = torch.searchsorted(text_at, at)
    near = before.clamp(max=text.shape[1] - 1)
    stay = torch.where(
        text_at.gather(1, near) == at,
        text.gather(1, near),
        visual.gather(1, (at - before).clamp(max=visual.shape[1] - 1)),
    )
    return stay, left.gather(1, stay), number.gather(1, chosen), visual_at, text_at


@fusable
def sound(scores: Tensor, features: Tensor | None = None) -> Tensor:
    """Whether no score is NaN and all features, if they are given, are finite."""
    fine = ~scores.isnan().any()
    return fine if features is None else fine & features.isfinite().all()
