"""Baselines: what any strategy has to beat."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from strategy.base import Strategy, View, mean_of
from strategy.clse import CLSE
from strategy.options import Options, at_least, option
from strategy.plan import Facts, Grid, Plan
from strategy.registry import register

SEEDS, MOST_STAGES = 1 << 20, 1 << 10  # different draws; beyond these bounds, 64 bits would not hold them
BUDGET = 192  # tokens, where none is given: CLSE's
ELSEWHERE = 1e6  # tokens of another frame or picture are farther than any on the grid


@dataclass(frozen=True, init=False)
class RandomOptions(Options):
    """The options of `random`."""

    seed: int = option(0, at_least(0), "Which random numbers: another seed is another draw.")


@register("random")
class Random(CLSE):
    """A seeded random score at CLSE's stages, the same on every device and for every sample with as many tokens.

    Whatever CLSE gains over this one it gains by its score, since everything else is CLSE's.
    """

    options_type = RandomOptions

    def score(self, view: View) -> Tensor:
        samples, count = view.visual.shape
        # An integer hash of each token's place: the same on every device, and nothing to copy there.
        draw = self.options.seed % SEEDS * MOST_STAGES + view.stage
        bits = torch.arange(count, device=view.visual.device) + draw * 0x9E3779B1
        for _ in range(2):
            bits = ((bits >> 16) ^ bits) * 0x45D9F3B & 0xFFFFFFFF
        return ((bits >> 16) ^ bits).float().expand(samples, -1)


def strided(grid: Grid, count: int, device: torch.device) -> Tensor:
    """Return the positions [count] of tokens spread evenly over a grid, row by row.

    Frames get equally many tokens, to within one, and so do the rows that are used. As many rows are used as make the
    steps down and across alike.

    Raises:
        ValueError: The grid has fewer tokens than `count`.
    """
    frames, height, width = grid
    if count > frames * height * width:
        raise ValueError(f"{count} tokens do not fit on grid {grid}")
    most = math.ceil(count / frames)
    rows = min(height, max(1, math.ceil(most / width), round(math.sqrt(most * height / width))))
    frame, at, of_frame = _parts(torch.arange(count, device=device), count, frames)
    row, at, of_row = _parts(at, of_frame, rows)
    column = (2 * at + 1) * width // (2 * of_row)
    return (frame * height + (2 * row + 1) * height // (2 * rows)) * width + column


def _parts(at: Tensor, count: Tensor | int, parts: int) -> tuple[Tensor, Tensor, Tensor | int]:
    """Split `count` things as evenly as possible; return each one's part, its position there, and the part's size."""
    part = ((at + 1) * parts + count - 1) // count - 1
    first = part * count // parts
    return part, at - first, (part + 1) * count // parts - first


@register("uniform")
class Uniform(Strategy):
    """Tokens at even steps over the grid of each picture or frame, before the first layer.

    Pictures of one prompt share the budget by their size. At later stages, where the grid is broken, the
    tokens left are picked at regular intervals.
    """

    def plan(self, facts: Facts) -> Plan:
        return self.plan_before_layers(facts, tokens=BUDGET)

    def score(self, view: View) -> Tensor:
        samples, count = view.visual.shape
        device, scores = view.visual.device, torch.zeros(count, device=view.visual.device)
        grids = list(zip(view.grids, view.on_grid, strict=True))
        if view.stage:
            grids = [((1, 1, count), torch.arange(count, device=device))]
        seen, total = 0, sum(math.prod(grid) for grid, _ in grids)
        keep = min(view.keep, total)
        for grid, tokens in grids:
            before, seen = seen, seen + math.prod(grid)
            mine = strided(grid, seen * keep // total - before * keep // total, device)
            scores = scores.index_fill(0, tokens[mine], 1)
        return scores.expand(samples, -1)


@register("pool")
class Pool(Uniform):
    """Average pooling: the tokens that `uniform` keeps, each the mean of all tokens nearest to it on the grid."""

    def merge(self, view: View, kept: Tensor) -> Tensor:
        count = view.visual.shape[1]
        place = torch.zeros(count, 3, device=kept.device)
        place[:, 2] = torch.arange(count, device=kept.device)
        if not view.stage:
            place[:, 0] = -ELSEWHERE  # tokens on no grid are near each other only
            for number, ((_, height, width), tokens) in enumerate(zip(view.grids, view.on_grid, strict=True)):
                at = torch.arange(len(tokens), device=kept.device)
                where = (number * ELSEWHERE + at // (height * width), at // width % height, at % width)
                place[tokens] = torch.stack(where, dim=1).to(place)
        seeds = kept[0]
        gap = (place[:, None] - place[seeds]).abs()
        near = gap[..., 0] * ELSEWHERE + gap[..., 1:].square().sum(-1)
        # Seeds stand right of and below the middle of a block of even side: what lies halfway goes to the last.
        nearest = seeds.flip(0)[near.flip(1).sort(dim=1, stable=True).indices[:, 0]]
        alone = near.amin(1) > ELSEWHERE**2 / 2
        return mean_of(torch.where(alone, -1, nearest).expand(len(kept), -1), kept)
