"""PyramidDrop (CVPR 2025, arXiv 2410.17247): the deeper the layer, the fewer visual tokens."""

from dataclasses import replace

from torch import Tensor

from strategy.base import Strategy, View
from strategy.plan import Facts, Plan
from strategy.registry import register

LAMBDA = 0.5


@register("pdrop")
class PyramidDrop(Strategy):
    """The attention that the last instruction token pays each visual token (section 3.2).

    Pruned at 1/4, 1/2 and 3/4 of the depth; of what was left before, each stage keeps the share lambda, 0.5 as
    published. A single budget is what the first stage keeps, half of the tokens if none is given.
    """

    def plan(self, facts: Facts) -> Plan:
        layers = self.prune_layers(facts, tuple(round(facts.depth * quarter / 4) for quarter in (1, 2, 3)))
        weights = tuple(LAMBDA**stage for stage in range(len(layers)))
        return Plan.resolve(layers, None, replace(self.budget(ratio=0.5), weights=weights), facts)

    def score(self, view: View) -> Tensor:
        return view.attention(view.last).mean(dim=(1, 2))
