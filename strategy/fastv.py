"""FastV (ECCV 2024, arXiv 2403.06764): what the last token does not look at after layer 2 is dropped."""

from torch import Tensor

from strategy.base import Strategy, View
from strategy.plan import Facts, Plan
from strategy.registry import register


@register("fastv")
class FastV(Strategy):
    """The attention that the last prompt token pays each visual token, mean over heads (section 4.1).

    One stage at K = 2, half of the tokens (R = 50 %), as published. The paper averages the attention that a
    token receives; its code, like all that compare with it, takes the last token's, and so does this.
    """

    def plan(self, facts: Facts) -> Plan:
        return Plan.resolve(self.prune_layers(facts, (2,)), None, self.budget(ratio=0.5), facts)

    def score(self, view: View) -> Tensor:
        return view.attention(view.last).mean(dim=(1, 2))
