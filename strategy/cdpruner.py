"""CDPruner (NeurIPS 2025, arXiv 2506.10967): a determinantal set of tokens that differ and concern the question."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import normalize

from strategy.base import Strategy, View
from strategy.config import VTRConfig
from strategy.kernels.selection import first_maximum, unit_range
from strategy.options import Options, option, path
from strategy.plan import Facts, Plan
from strategy.registry import register

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


def likeness(visual: Tensor, text: Tensor) -> Tensor:
    """Return the product of visual tokens [G, N, C], made of length 1, with a text [G, C] as it is, [G, N]."""
    # Of features that are not finite, the engine says so.
    return (normalize(visual.float(), dim=-1).nan_to_num() * text[:, None]).sum(-1)


def relevance(visual: Tensor, words: Tensor, asked: Tensor) -> Tensor:
    """Return the cosine of visual tokens [G, N, C] with the mean of the words [G, R, C] asked, from 0 to 1, [G, N]."""
    mean = (words.float().nan_to_num() * asked[..., None]).sum(1)
    return unit_range(likeness(visual, normalize(mean, dim=-1)))


@dataclass(frozen=True, init=False)
class CDPrunerOptions(Options):
    """The options of CDPruner."""

    weights: ClassVar[tuple[str, ...]] = ("clip_text",)

    clip_text: str | None = option(
        None,
        path,
        "The CLIP model, a hub id or a folder, with whose text features the patches are compared, as published: "
        "`openai/clip-vit-large-patch14-336` for LLaVA-1.5, and none for other models. Without it, embeddings of the "
        "decoder are compared.",
    )


@register("cdpruner")
class CDPruner(Strategy):
    """The greedy maximum of a determinantal point process with kernel r_i cos_ij r_j, r the relevance (section 3).

    One stage before the first layer, on the projected features, 192 tokens. The published relevance, which takes
    `clip_text`, is the negative cosine of a patch, from the vision tower's second last layer, with the question, both
    in CLIP's joint space. Choices: without it, relevance is the cosine of a projected feature with the mean embedding
    of all tokens behind the picture, which include the template's, and is not negated. It is scaled to 0 ... 1 in each
    sample, as the published code does in its batches of one. Where a question is too long for the text tower, each
    piece is a text of its own, with a first and a last token; in the published code only the whole has these.
    """

    options_type = CDPrunerOptions

    def __init__(self, config: VTRConfig) -> None:
        super().__init__(config)
        self.clip_text = self.options.clip_text
        self.encoder_layer = None if self.clip_text is None else -2

    def plan(self, facts: Facts) -> Plan:
        return self.plan_before_layers(facts, tokens=192)

    def select(self, view: View) -> Tensor:
        if view.joint is None:
            weight = relevance(view.features, view.features_at(view.question), view.asked)
        else:
            weight = unit_range(-likeness(view.joint.visual, view.joint.question))
        unit = normalize(view.features.float(), dim=-1).nan_to_num() * weight[..., None]
        return greedy_map(unit @ unit.transpose(1, 2), view.keep).sort(dim=1).values
