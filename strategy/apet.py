"""ApET (CVPR 2026, arXiv 2602.19870): tokens that a few others cannot approximate are kept, without any attention."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn.functional import normalize

from strategy.base import Strategy, View, mean_of
from strategy.kernels.selection import first_maximum, most_alike
from strategy.options import Options, count, option
from strategy.plan import Facts, Plan
from strategy.registry import register

SHARES = (1.5, 0.5)  # of the budget, in front of the first layer and from the middle on (the published code)
EPS = 1e-4  # share of a token's length below which it lies in the span of the basis


def approximation_error(features: Tensor, basis: int) -> Tensor:
    """Return how far each token is from the nearest linear combination of some basis tokens, [G, N].

    The basis is chosen by farthest point sampling: the first token, then the one whose nearest basis token is farthest.

    Args:
        features: [G, N, C].
        basis: How many basis tokens; more than N choose some again, which adds nothing.
    """
    residual = features
    nearest = torch.full(features.shape[:2], torch.inf, device=features.device)
    best = torch.zeros_like(nearest[:, :1], dtype=torch.long)
    for _ in range(basis):
        token, left = (tensor.take_along_dim(best[..., None], 1) for tensor in (features, residual))
        # Gram-Schmidt: what is left of a basis token is orthogonal to those before. Where it is rounding, it adds none.
        fresh = left.norm(dim=-1, keepdim=True) > EPS * token.norm(dim=-1, keepdim=True)
        axis = normalize(left, dim=-1) * fresh
        residual = residual - (residual * axis).sum(-1, keepdim=True) * axis
        nearest = torch.minimum(nearest, (features - token).norm(dim=-1))
        best = first_maximum(nearest)
    # Rounding must not choose among tokens that the basis spans, its own among them.
    error = residual.norm(dim=-1)
    return error.masked_fill(error <= EPS * features.norm(dim=-1), 0)


@dataclass(frozen=True, init=False)
class ApETOptions(Options):
    """The options of ApET."""

    basis_token_num: int = option(10, count, "How many basis tokens approximate the others.")


@register("apet")
class ApET(Strategy):
    """The error of a least squares approximation by ten basis tokens; dropped tokens are merged (section 3).

    Two stages: before the first layer 1.5 times the budget, at half of the depth 0.5 times, so that the mean layer has
    it; 192 tokens. A dropped token is merged into the kept token most like it by cosine, as a mean. Choices: the first
    stage sees the projected features, not those before the projector; sampling begins at the first token, not at a
    random one. How merged tokens are weighted could not be checked.
    """

    options_type = ApETOptions

    def plan(self, facts: Facts) -> Plan:
        layers = self.config.prune_layer or (0, max(1, round(facts.depth / 2)))
        return Plan.resolve(layers, None, replace(self.budget(tokens=192), weights=SHARES), facts, earliest=0)

    def score(self, view: View) -> Tensor:
        return approximation_error(view.features.float(), self.options.basis_token_num)

    def merge(self, view: View, kept: Tensor) -> Tensor:
        return mean_of(most_alike(view.features, kept).scatter(1, kept, kept), kept)
