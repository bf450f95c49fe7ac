"""SCOPE (NeurIPS 2025, arXiv 2510.24214): salient tokens that cover what the chosen ones do not."""

from torch import Tensor
from torch.nn.functional import normalize

from strategy.base import Strategy, View
from strategy.kernels.selection import greedy_coverage
from strategy.plan import Facts, Plan
from strategy.registry import register


@register("scope")
class SCOPE(Strategy):
    """The greedy maximum of coverage, each gain times the attention that the tower pays the token (section 3).

    One stage before the first layer, 192 tokens. Likeness is the cosine of features and saliency the attention, as the
    sum over heads, at the second last layer of the vision tower; the exponent of saliency is 1, the default of the
    published code. No question is needed. Pictures of one prompt share the budget.
    """

    encoder_layer = -2

    def plan(self, facts: Facts) -> Plan:
        return self.plan_before_layers(facts, tokens=192)

    def select(self, view: View) -> Tensor:
        assert view.encoder is not None
        # A feature that is not finite has no direction; the engine finds it on the features.
        unit = normalize(view.encoder.features.float(), dim=-1).nan_to_num()
        saliency = view.encoder.attention.sum(1)
        return greedy_coverage(unit @ unit.transpose(1, 2), saliency, view.keep).sort(dim=1).values
