"""Where the visual tokens of a batch lie."""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from strategy.backbone import Layout, Span
from strategy.plan import Grid


class ResolvedSpan(NamedTuple):
    """A span with the start of each of its frames."""

    starts: tuple[int, ...]
    grid: Grid
    lead: int

    @property
    def frame_size(self) -> int:
        """Return how many tokens one frame has."""
        return self.lead + self.grid[1] * self.grid[2]


def resolve_layout(layout: Layout, batch: int, length: int) -> list[list[ResolvedSpan]]:
    """Return the spans of each sample, in order.

    Raises:
        ValueError: The layout does not fit prompts [batch, length].
    """
    if len(layout) != batch:
        raise ValueError(f"the layout describes {len(layout)} samples, the batch has {batch}")
    ordered = []
    for sample, given in enumerate(layout):
        spans = sorted(_resolve(sample, Span(*span)) for span in given)
        end = 0
        for span in spans:
            for start in span.starts:
                if start < end:
                    raise ValueError(f"sample {sample}: the span at {start} begins before {end}, inside another one")
                end = start + span.frame_size
        if end >= length:
            raise ValueError(
                f"sample {sample}: the visual tokens end at {end} of {length} tokens, but text must follow them"
            )
        ordered.append(spans)
    return ordered


def _resolve(sample: int, span: Span) -> ResolvedSpan:
    grid, lead = tuple(map(int, span.grid)), int(span.lead)
    if len(grid) != 3 or min(grid) < 1:
        raise ValueError(f"sample {sample}: grid {grid} is not three numbers from 1 up (T, H, W)")
    if lead < 0:
        raise ValueError(f"sample {sample}: lead={lead}, want the number of tokens before each frame's patches")
    if isinstance(span.start, Sequence):
        starts = tuple(map(int, span.start))
    else:
        starts = tuple(int(span.start) + frame * (lead + grid[1] * grid[2]) for frame in range(grid[0]))
    if len(starts) != grid[0]:
        raise ValueError(f"sample {sample}: grid {grid} has {grid[0]} frames, but {len(starts)} starts are given")
    return ResolvedSpan(starts, (grid[0], grid[1], grid[2]), lead)


def on_grid(kinds: Iterable[tuple[Grid, int]], device: torch.device) -> tuple[Tensor, ...]:
    """Return, for each grid with its lead, which of a sample's visual tokens lie on the grid."""
    tokens, first = [], 0
    for (frames, height, width), lead in kinds:
        size = lead + height * width
        tokens.append(torch.arange(first, first + frames * size, device=device).view(frames, size)[:, lead:].flatten())
        first += frames * size
    return tuple(tokens)
