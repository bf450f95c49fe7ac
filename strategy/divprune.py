"""DivPrune (CVPR 2025, arXiv 2503.02175): the tokens that differ most from one another, before the first layer."""

import torch
from torch import Tensor

from strategy.base import Strategy, View
from strategy.kernels.selection import first_maximum
from strategy.plan import Facts, Plan
from strategy.registry import register


def most_diverse(features: Tensor, count: int) -> Tensor:
    """Choose tokens by the greedy solution of the max-min diversity problem (equation 3).

    The distance of two tokens is one minus the cosine of their features. The first token is the one farthest from its
    nearest neighbour, each next token the one farthest from all chosen so far; of equal tokens the first.

    Args:
        features: [G, N, C].
        count: How many tokens.

    Returns:
        The chosen tokens, in the order of choice, [G, count].
    """
    # A feature that is not finite has no direction; the engine finds it on the features.
    unit = torch.nn.functional.normalize(features.float(), dim=-1).nan_to_num()
    distance = 1 - unit @ unit.transpose(1, 2)
    itself = torch.eye(features.shape[1], dtype=torch.bool, device=features.device)
    nearest = distance.masked_fill(itself, torch.inf).amin(-1)
    gone = torch.zeros_like(nearest, dtype=torch.bool)
    chosen: list[Tensor] = []
    for _ in range(count):
        open_ = nearest.masked_fill(gone, -torch.inf)
        best = first_maximum(open_)
        new = distance.take_along_dim(best[..., None], 1)[:, 0]
        nearest = torch.minimum(nearest, new) if chosen else new
        gone = gone.scatter(1, best, True)
        chosen.append(best)
    return torch.cat(chosen, dim=1)


@register("divprune")
class DivPrune(Strategy):
    """The set of tokens whose least cosine distance is greatest (section 3); no question is needed.

    One stage before the first layer, on the projected features, 9.8 % of the tokens, as published.
    """

    def plan(self, facts: Facts) -> Plan:
        return self.plan_before_layers(facts, ratio=0.098)

    def select(self, view: View) -> Tensor:
        return most_diverse(view.features, view.keep).sort(dim=1).values
