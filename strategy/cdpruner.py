"""CDPruner (NeurIPS 2025, arXiv 2506.10967): a determinantal set of tokens that differ and concern the question."""

import torch
from torch import Tensor
from torch.nn.functional import normalize

from strategy.base import Strategy, View
from strategy.kernels.selection import first_maximum
from strategy.plan import Facts, Plan
from strategy.registry import register

EPS = 1e-6
DEPENDENT = 1e-5  # share of its own variance below which a token counts as a combination of those chosen


def greedy_map(kernel: Tensor, count: int) -> Tensor:
    """Choose tokens one by one, each the one that raises the determinant of the kernel's submatrix most.

    Each step adds a row of the Cholesky factor of that submatrix (Chen et al., NeurIPS 2018). A token that is a linear
    combination of those chosen raises it no more than any other such token, and of equal ones the first is chosen.

    Args:
        kernel: A positive semidefinite matrix [G, N, N].
        count: How many tokens.

    Returns:
        The chosen tokens, in the order of choice, [G, count].
    """
    own = kernel.diagonal(dim1=1, dim2=2)
    variance, gone = own, torch.zeros_like(own, dtype=torch.bool)
    factor = kernel.new_zeros(len(kernel), count, kernel.shape[1])
    chosen: list[Tensor] = []
    for step in range(count):
        gain = variance.masked_fill(variance <= DEPENDENT * own, 0)
        best = first_maximum(gain.masked_fill(gone, -torch.inf))
        row = kernel.take_along_dim(best[..., None], 1)[:, 0]
        if step:
            before = factor[:, :step]
            row = row - (before.take_along_dim(best[..., None], 2) * before).sum(1)
        left = gain.gather(1, best)
        row = torch.where(left > 0, row / left.clamp(min=torch.finfo(row.dtype).tiny).sqrt(), 0)
        factor[:, step] = row
        variance = variance - row.square()
        gone = gone.scatter(1, best, True)
        chosen.append(best)
    return torch.cat(chosen, dim=1)


def relevance(visual: Tensor, words: Tensor, asked: Tensor) -> Tensor:
    """Return the cosine of visual tokens [G, N, C] with the mean of the words [G, R, C] asked, from 0 to 1, [G, N]."""
    # Of features that are not finite, the engine says so.
    mean = (words.float().nan_to_num() * asked[..., None]).sum(1, keepdim=True)
    likeness = (normalize(visual.float(), dim=-1).nan_to_num() * normalize(mean, dim=-1)).sum(-1)
    least, most = likeness.aminmax(dim=1, keepdim=True)
    return (likeness - least + EPS) / (most - least + EPS)


@register("cdpruner")
class CDPruner(Strategy):
    """The greedy maximum of a determinantal point process with kernel r_i cos_ij r_j, r the relevance (section 3).

    One stage before the first layer, on the projected features, 192 tokens. Choices: the published relevance compares
    CLIP's features of patches and of the question, which the decoder does not have; here it is the cosine of a
    projected feature with the mean embedding of all tokens behind the picture, which include the template's. It is
    scaled to 0 ... 1 in each sample, as in the published code. That code negates it for CLIP, whose patches answer
    inversely; this does not.
    """

    def plan(self, facts: Facts) -> Plan:
        return self.plan_before_layers(facts, tokens=192)

    def select(self, view: View) -> Tensor:
        weight = relevance(view.features, view.features_at(view.question), view.asked)
        unit = normalize(view.features.float(), dim=-1).nan_to_num() * weight[..., None]
        return greedy_map(unit @ unit.transpose(1, 2), view.keep).sort(dim=1).values
