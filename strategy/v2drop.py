"""V2Drop (CVPR 2026, arXiv 2509.01552): tokens that a layer hardly changes are dropped."""

from dataclasses import replace

from torch import Tensor

from strategy.base import Strategy, View
from strategy.plan import Facts, Plan
from strategy.registry import register

LAYERS, DEPTH = (3, 17, 22), 32
# Tokens kept of LLaVA's 576 after each stage, for a mean of about 192 over the layers (the published code).
PUBLISHED = (288, 144, 1)
BUDGET = 192


@register("v2drop")
class V2Drop(Strategy):
    """The Euclidean distance between a token's states before and behind the layer in front of the prune (section 3).

    Three stages, at layers 3, 17 and 22 of 32, and as deep a share of other depths; the last one leaves one token, as
    the published code does. A single budget b keeps 1.5 b, 0.75 b and one token; the schedules of the paper's other
    budgets could not be checked. No question is needed.
    """

    def plan(self, facts: Facts) -> Plan:
        layers = self.config.prune_layer or facts.as_deep(LAYERS, DEPTH)
        budget = replace(self.budget(tokens=BUDGET), weights=tuple(kept / BUDGET for kept in PUBLISHED))
        return Plan.resolve(layers, None, budget, facts)

    def score(self, view: View) -> Tensor:
        return (view.features.float() - view.entered_at(view.visual).float()).norm(dim=-1)
