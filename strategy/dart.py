"""DART (EMNLP 2025, arXiv 2502.11494): duplicates of a few pivots are dropped, whatever their importance."""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import normalize

from strategy.base import Strategy, View
from strategy.kernels.selection import positions_of, select_top
from strategy.options import Options, count, option
from strategy.plan import Facts, Plan
from strategy.registry import register


@dataclass(frozen=True, init=False)
class DARTOptions(Options):
    """The options of DART."""

    pivot_image_token: int = option(4, count, "How many visual tokens are pivots.")
    pivot_text_token: int = option(4, count, "How many tokens behind the picture are pivots.")


def largest(norms: Tensor, count: int, real: Tensor) -> Tensor:
    """Return the positions [G, count] of the largest norms [G, N] among the real ones, in order.

    Where fewer are real, these are returned in turns.

    Args:
        norms: [G, N], not negative.
        count: How many.
        real: [G, N], False at padding; at least one of a row is True.
    """
    order = norms.nan_to_num().masked_fill(~real, -1).sort(dim=1, descending=True, stable=True).indices
    turns = torch.arange(count, device=norms.device) % real.sum(1, keepdim=True).clamp(max=count)
    return order.gather(1, turns).sort(dim=1).values


def least_alike(features: Tensor, pivots: Tensor, taken: Tensor, count: int) -> Tensor:
    """Choose, for each pivot in turn, the tokens least like it by cosine among those not taken.

    The pivots share the tokens evenly; the first ones get one more where that does not come out even.

    Args:
        features: Tokens [G, N, C].
        pivots: [G, P, C].
        taken: [G, N], the tokens chosen before.
        count: How many tokens are chosen in all.

    Returns:
        [G, N], the tokens chosen before or here.
    """
    # A feature that is not finite has no direction; the engine finds it on the features.
    features, pivots = (normalize(each.float(), dim=-1).nan_to_num() for each in (features, pivots))
    unlike = 1 - pivots @ features.transpose(1, 2)
    number = pivots.shape[1]
    for pivot in range(number):
        share = count // number + (pivot < count % number)
        if share:
            best = select_top(unlike[:, pivot].masked_fill(taken, -torch.inf), share)
            taken = taken.scatter(1, best, True)
    return taken


@register("dart")
class DART(Strategy):
    """Pivots, the tokens with the largest L1 norm of their keys, and the tokens least alike each of them (section 3).

    One stage at K = 2, 128 tokens, four pivots among the visual tokens and four behind them. Choices: visual pivots
    count against the budget, where the published code keeps them on top of it; pivots take turns in the order of the
    sequence, where that code has the order of a Python set; and tokens are compared as the layer left them, where that
    code applies the decoder's final norm first. Keys are those in the cache, after the rotary embedding.
    """

    options_type = DARTOptions

    def plan(self, facts: Facts) -> Plan:
        return Plan.resolve(self.prune_layers(facts, (2,)), None, self.budget(tokens=128), facts)

    def select(self, view: View) -> Tensor:
        visual, text = min(self.options.pivot_image_token, view.keep), self.options.pivot_text_token
        norms, others = (view.keys_at(at).float().abs().sum((1, 3)) for at in (view.visual, view.question))
        own = largest(norms, visual, torch.ones_like(norms, dtype=torch.bool))
        words = largest(others, text, view.asked)
        pivots = torch.cat([view.visual.gather(1, own), view.question.gather(1, words)], dim=1)
        taken = torch.zeros_like(norms, dtype=torch.bool).scatter(1, own, True)
        taken = least_alike(view.features, view.features_at(pivots), taken, view.keep - visual)
        return positions_of(taken, view.keep)
