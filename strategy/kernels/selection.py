"""Which tokens stay, by their scores, and where they are afterwards."""

import torch
from torch import Tensor
from torch.nn.functional import normalize

from strategy.kernels.compile import compilable, is_compiling

# Up to so many tokens one compiled comparison of all pairs is faster than a sort.
MAX_PAIRWISE_TOKENS = 1 << 12


def select_top(scores: Tensor, count: int) -> Tensor:
    """Return the positions [G, count], in order, of the highest scores [G, N]; of equal scores the first wins."""
    if is_compiling() and scores.shape[1] <= MAX_PAIRWISE_TOKENS:
        return select_top_by_pairs(scores, count)
    # A stable sort breaks ties alike on every device, which top-k does not.
    order = scores.sort(dim=1, descending=True, stable=True).indices
    return positions_of(torch.zeros_like(order, dtype=torch.bool).scatter_(1, order[:, :count], True), count)


@compilable
def select_top_by_pairs(scores: Tensor, count: int) -> Tensor:
    """Compute `select_top` by counting, for each score, how many of its row precede it in that sort."""
    own, other = scores[:, :, None], scores[:, None]
    at = torch.arange(scores.shape[1], device=scores.device)
    before = ((other > own) | ((other == own) & (at < at[:, None]))).sum(-1)
    return positions_of(before < count, count)


def positions_of(mask: Tensor, count: int) -> Tensor:
    """Return the positions [G, count], in order, of the true values of a mask [G, N] with `count` of them a row."""
    wanted = torch.arange(1, count + 1, device=mask.device).repeat(len(mask), 1)
    return torch.searchsorted(mask.cumsum(1), wanted)


def first_maximum(values: Tensor) -> Tensor:
    """Return the position [..., 1] of the greatest of each row of values [..., N], of equal ones the first."""
    # argmax may return any of equal maxima, and devices differ.
    at = torch.arange(values.shape[-1], device=values.device)
    return at.where(values == values.amax(-1, keepdim=True), len(at) - 1).amin(-1, keepdim=True)


def most_alike(features: Tensor, targets: Tensor) -> Tensor:
    """Return for each token the target that is most like it by cosine, of equal ones the first, [G, N].

    Args:
        features: [G, N, C].
        targets: The tokens to choose from, [G, M].
    """
    unit = normalize(features.float(), dim=-1)
    likeness = unit @ unit.take_along_dim(targets[..., None], 1).transpose(1, 2)
    return targets.gather(1, first_maximum(likeness)[..., 0])


def greedy_coverage(likeness: Tensor, weight: Tensor, count: int) -> Tensor:
    """Choose tokens one by one, each the one with the greatest gain in coverage times its weight.

    Coverage is that of facility location: each target is covered as far as the chosen token most like it is like it,
    and by nothing at first. Of equal tokens the first is chosen.

    Args:
        likeness: Of N tokens and M targets, [G, N, M]; what is negative covers nothing.
        weight: [G, N], not negative.
        count: How many tokens.

    Returns:
        The chosen tokens, in the order of choice, [G, count].
    """
    covered, gone = torch.zeros_like(likeness[:, 0]), torch.zeros_like(weight, dtype=torch.bool)
    chosen: list[Tensor] = []
    for _ in range(count):
        gain = (likeness - covered[:, None]).clamp(min=0).sum(-1)
        best = first_maximum((gain * weight).masked_fill(gone, -torch.inf))
        covered = torch.maximum(covered, likeness.take_along_dim(best[..., None], 1)[:, 0])
        gone = gone.scatter(1, best, True)
        chosen.append(best)
    return torch.cat(chosen, dim=1)


def share_out(wanted: Tensor, room: Tensor, first: Tensor, total: int) -> Tensor:
    """Return how many tokens each of M groups gets, [G, M], `total` together.

    Args:
        wanted: [G, M], at most `total` together; a group with less room gets less.
        room: [G, M], the most that each group may get, at least `total` together.
        first: [G, M], the groups in the order in which they get what is left over, each as far as it has room.
        total: How many tokens.
    """
    given = torch.minimum(wanted, room)
    free = (room - given).gather(1, first)
    left = total - given.sum(1, keepdim=True) - (free.cumsum(1) - free)
    return given.scatter_add(1, first, torch.minimum(left.clamp(min=0), free))


def best_of_groups(scores: Tensor, group: Tensor, shares: Tensor) -> Tensor:
    """Return which tokens are among the highest scores [G, N] of their group, of equal ones the first, [G, N].

    Args:
        scores: [G, N].
        group: [G, N], the number of each token's group.
        shares: [G, M], how many tokens of each group that are.
    """
    order = scores.sort(dim=1, descending=True, stable=True).indices
    own = group.gather(1, order)
    inside = own[..., None] == torch.arange(shares.shape[1], device=own.device)
    rank = inside.cumsum(1).gather(2, own[..., None])[..., 0]
    return torch.zeros_like(own, dtype=torch.bool).scatter(1, order, rank <= shares.gather(1, own))


@compilable
def is_selection(chosen: Tensor, count: int) -> Tensor:
    """Return whether each row of `chosen` [G, K] names different ones of `count` tokens, in order."""
    return (chosen[:, 1:] > chosen[:, :-1]).all() & (chosen >= 0).all() & (chosen < count).all()


@compilable
def keep_chosen(
    remaining: Tensor, original_index: Tensor, visual: Tensor, text: Tensor, chosen: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Narrow the tensors of a `SampleGroup` to the `chosen` [G, N'] of its visual tokens.

    Returns:
        The positions that stay, [G, R'], and the narrowed `remaining`, `original_index`, `visual` and `text`.
    """
    visual = visual.gather(1, chosen)
    # Two sorted lists are merged: each smaller element of the other list moves a position on by one.
    visual_at = torch.searchsorted(text, visual) + torch.arange(visual.shape[1], device=remaining.device)
    text_at = torch.searchsorted(visual, text) + torch.arange(text.shape[1], device=remaining.device)
    at = torch.arange(visual.shape[1] + text.shape[1], device=remaining.device).repeat(len(remaining), 1)
    before = torch.searchsorted(text_at, at)
    near = before.clamp(max=text.shape[1] - 1)
    stay = torch.where(
        text_at.gather(1, near) == at,
        text.gather(1, near),
        visual.gather(1, (at - before).clamp(max=visual.shape[1] - 1)),
    )
    return stay, remaining.gather(1, stay), original_index.gather(1, chosen), visual_at, text_at


@compilable
def all_finite(scores: Tensor | None, features: Tensor | None) -> Tensor:
    """Return whether no score is NaN and all features are finite, of the two that are given; at least one is."""
    if scores is None:
        assert features is not None
        return features.isfinite().all()
    fine = ~scores.isnan().any()
    return fine if features is None else fine & features.isfinite().all()


def unit_range(values: Tensor) -> Tensor:
    """Return values [G, N] scaled to 0 ... 1 in each sample; where all are equal, 1."""
    least, most = values.aminmax(dim=1, keepdim=True)
    return (values - least + 1e-6) / (most - least + 1e-6)


def mean_of_neighbours(values: Tensor, count: int) -> Tensor:
    """Return the means [..., N, D] of each `count` neighbours of values [..., N * count, D]."""
    return values.unflatten(-2, (-1, count)).mean(dim=-2)
