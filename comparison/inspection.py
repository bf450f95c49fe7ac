"""One question in detail: what a strategy computed, which tokens it kept, and how the model answered."""

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field

import torch
from PIL import Image
from torch import Tensor

from strategy import Grid, RunRecord, View, VTRConfig
from strategy.clse import CLSEOptions, evolution_factor, spectral_energy

Maps = list[Tensor]
"""Values on the grid of each picture or video, [T, H, W]; or of each frame, [H, W]."""


@dataclass(frozen=True)
class Inspection:
    """One question, its answer, and what was computed and kept of its pictures.

    Attributes:
        question: The question.
        target: The right answer; empty if nobody knows.
        answer: The model's answer.
        frames: The pictures, or the frames of a video, in order, each cropped to what its grid covers.
        maps: By name, values [H, W] for each frame.
        kept: For each stage the layer it pruned at, and a mask [H, W] of the tokens that stayed for each frame.
    """

    question: str
    target: str
    answer: str
    frames: Sequence[Image.Image]
    maps: dict[str, Maps] = field(default_factory=dict)
    kept: list[tuple[int, Maps]] = field(default_factory=list)


class StageRecorder:
    """Records what the scores of the first stage that drops something were made from; a `watch` of `strategy.attach`.

    Attributes:
        grids: The grids of the pictures.
        maps: By name, values on the grids: `score`, where the strategy ranks by one; `attention` of the last prompt
            token, where a layer has run; and the spectral `evolution`, where the strategy has a reference.
    """

    def __init__(self, config: VTRConfig) -> None:
        # Other strategies that have a reference are drawn with the defaults.
        self.clse = config.options if isinstance(config.options, CLSEOptions) else CLSEOptions()
        self.grids: tuple[Grid, ...] = ()
        self.on_grid: tuple[Tensor, ...] = ()
        self.maps: dict[str, Maps] = {}

    def __call__(self, view: View, scores: Tensor | None, kept: Tensor) -> None:
        if self.grids:
            return
        self.grids, self.on_grid = view.grids, tuple(tokens.cpu() for tokens in view.on_grid)
        self.maps = {} if scores is None else {"score": self._on_grids(scores[0])}
        with suppress(ValueError):  # before the first layer there is no attention
            self.maps["attention"] = self._on_grids(view.attention(view.last)[0].mean((0, 1)))
        with suppress(ValueError):  # the strategy has no reference, or the grid no spectrum
            self.maps["evolution"] = self._evolution(view)

    def inspection(
        self, question: str, target: str, answer: str, frames: Sequence[Image.Image], record: RunRecord
    ) -> Inspection:
        """Return what was recorded of a prompt that was prefilled alone, with its answer."""
        kept = []
        # Without grids no stage dropped anything, and there is nothing to show.
        for stage in record.stages if self.grids else []:
            mask = torch.zeros(record.visual_sum)
            mask[stage.kept[0].cpu()] = 1
            kept.append((stage.layer, _by_frame(self._on_grids(mask))))
        maps = {name: _by_frame(values) for name, values in self.maps.items()}
        return Inspection(question, target, answer, list(frames), maps, kept)

    def _on_grids(self, values: Tensor) -> Maps:
        pairs = zip(self.grids, self.on_grid, strict=True)
        return [values.float().cpu()[tokens].view(grid) for grid, tokens in pairs]

    def _evolution(self, view: View) -> Maps:
        maps = []
        for grid, tokens in zip(view.grids, view.on_grid, strict=True):
            volume = self.clse.clse_fft_3d and grid[0] > 1
            before, after = (
                spectral_energy(features[:1, tokens], grid, self.clse.clse_cutoff_ratio, volume)
                for features in (view.reference, view.features)
            )
            maps.append(evolution_factor(before, after, self.clse.clse_temp)[0].cpu().view(grid))
        return maps


def _by_frame(maps: Maps) -> Maps:
    return [frame for values in maps for frame in values]
