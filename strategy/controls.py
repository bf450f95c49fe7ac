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
        # An integer hash of each token's place: the same on every device, and nothing to copy there.
        bits = torch.arange(count, device=view.features.device) + (SEED + view.stage) * 0x9E3779B1
        for _ in range(2):
            bits = ((bits >> 16) ^ bits) * 0x45D9F3B & 0xFFFFFFFF
        return ((bits >> 16) ^ bits).float().expand(samples, -1)
