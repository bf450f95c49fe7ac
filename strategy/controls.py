"""Controls: what any strategy has to beat, at CLSE's stages and budgets."""

import torch
from torch import Tensor

from strategy.base import View
from strategy.clse import CLSE
from strategy.registry import register

SEED = 0


@register("random")
class Random(CLSE):
    """A seeded random score, the same on every device and for every sample with as many tokens.

    Whatever a strategy gains over this one it gains by its score, since everything else is CLSE's.
    """

    def score(self, view: View) -> Tensor:
        samples, count = view.features.shape[:2]
        generator = torch.Generator().manual_seed(SEED + view.stage)
        return torch.rand(count, generator=generator).to(view.features.device).expand(samples, -1)
