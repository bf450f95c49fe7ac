"""Where the visual tokens of a batch lie."""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from strategy.backbone import Layout, Span
from strategy.plan import Grid


class SpanKind(NamedTuple):
    """What spans have in common that differ in their place only, see `Span`."""

    grid: Grid
    lead: int = 0
    row_tail: int = 0
    tower_call: int = 0

    @property
    def frame_size(self) -> int:
        """Return how many tokens one frame has."""
        _, height, width = self.grid
        return self.lead + height * (width + self.row_tail)

    def on_grid(self, device: torch.device | None = None) -> Tensor:
        """Return which of the span's tokens lie on its grid, [T * H * W], on a device; the default is the CPU."""
        frames, height, width = self.grid
        frame = torch.arange(frames * self.frame_size, device=device).view(frames, -1)[:, self.lead :]
        return frame.reshape(frames, height, -1)[..., :width].flatten()


class ResolvedSpan(NamedTuple):
    """A span with the start of each of its frames."""

    starts: tuple[int, ...]
    kind: SpanKind

    @property
    def frame_size(self) -> int:
        """Return how many tokens one frame has."""
        return self.kind.frame_size


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
    grid = tuple(map(int, span.grid))
    kind = SpanKind(grid, int(span.lead), int(span.row_tail), int(span.tower_call))  # type: ignore[arg-type]
    if len(kind.grid) != 3 or min(kind.grid) < 1:
        raise ValueError(f"sample {sample}: grid {kind.grid} is not three numbers from 1 up (T, H, W)")
    if kind.lead < 0:
        raise ValueError(f"sample {sample}: lead={kind.lead}, want the number of tokens before each frame's patches")
    if kind.row_tail < 0:
        raise ValueError(f"sample {sample}: row_tail={kind.row_tail}, want the number of tokens behind each row")
    if isinstance(span.start, Sequence):
        starts = tuple(map(int, span.start))
    else:
        starts = tuple(int(span.start) + frame * kind.frame_size for frame in range(kind.grid[0]))
    if len(starts) != kind.grid[0]:
        raise ValueError(
            f"sample {sample}: grid {kind.grid} has {kind.grid[0]} frames, but {len(starts)} starts are given"
        )
    return ResolvedSpan(starts, kind)


def on_grid(kinds: Iterable[SpanKind], device: torch.device) -> tuple[Tensor, ...]:
    """Return, for each kind of span, which of a sample's visual tokens lie on its grid."""
    tokens, first = [], 0
    for kind in kinds:
        tokens.append(kind.on_grid(device) + first)
        first += kind.grid[0] * kind.frame_size
    return tuple(tokens)
