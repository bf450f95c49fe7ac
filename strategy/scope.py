"""SCOPE (NeurIPS 2025, arXiv 2510.24214): salient tokens that cover what the chosen ones do not."""

import torch
from torch import Tensor
from torch.nn.functional import normalize

from strategy.base import Strategy, View
from strategy.kernels.selection import first_maximum
from strategy.plan import Facts, Plan
from strategy.registry import register


def greedy_coverage(likeness: Tensor, weight: Tensor, count: int) -> Tensor:
    """Choose tokens one by one, each the one with the greatest gain in coverage times its weight.

    Coverage is that of facility location: each token is covered as far as the chosen token most like it is like it, and
    by nothing at first. Of equal ones the first is chosen.

    Args:
        likeness: [G, N, N]; what is negative covers nothing.
        weight: [G, N], not negative.
        count: How many tokens.

    Returns:
        The chosen tokens, in the order of choice, [G, count].
    """
    covered, gone = torch.zeros_like(weight), torch.zeros_like(weight, dtype=torch.bool)
    chosen: list[Tensor] = []
    for _ in range(count):
        gain = (likeness - covered[:, None]).clamp(min=0).sum(-1)
        best = first_maximum((gain * weight).masked_fill(gone, -torch.inf))
        covered = torch.maximum(covered, likeness.take_along_dim(best[..., None], 1)[:, 0])
        gone = gone.scatter(1, best, True)
        chosen.append(best)
    return torch.cat(chosen, dim=1)


@register("scope")
class SCOPE(Strategy):
    """The greedy maximum of coverage, each gain times the attention of the class token (section 3).

    One stage before the first layer, 192 tokens. Likeness is the cosine of features and saliency the attention, as the
    sum over heads, at the second last layer of the vision tower; the exponent of saliency is 1, the default of the
    published code. No question is needed. Pictures of one prompt share the budget.
    """

    encoder_layer = -2

    def plan(self, facts: Facts) -> Plan:
        return Plan.resolve(self.config.prune_layer or (0,), None, self.budget(tokens=192), facts, earliest=0)

    def select(self, view: View) -> Tensor:
        assert view.encoder is not None
        # A feature that is not finite has no direction; the engine finds it on the features.
        unit = normalize(view.encoder.features.float(), dim=-1).nan_to_num()
        saliency = view.encoder.attention.sum(1)
        return greedy_coverage(unit @ unit.transpose(1, 2), saliency, view.keep).sort(dim=1).values
