"""What a strategy saw in one question, and how a model answered it."""

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from strategy import Grid, RunRecord, View, VTRConfig
from strategy.clse import CLSEOptions, evolution_factor, spectral_energy

Maps = list[Tensor]
"""For each picture or video its values on the grid, [T, H, W]."""


class Watch:
    """Keeps, of the first stage that drops something, what the scores were made from: a `strategy.attach(watch=...)`.

    grids: those of the pictures. maps: by name, `score`, `attention` of the last prompt token where there is
    any yet, and the spectral `evolution` where the strategy has a reference.
    """

    def __init__(self, config: VTRConfig) -> None:
        self.config = config
        self.grids: tuple[Grid, ...] = ()
        self.on_grid: tuple[Tensor, ...] = ()
        self.maps: dict[str, Maps] = {}

    def __call__(self, view: View, scores: Tensor, kept: Tensor) -> None:
        if self.grids:
            return
        self.grids, self.on_grid = view.grids, tuple(tokens.cpu() for tokens in view.on_grid)
        self.maps = {"score": self._on_grids(scores[0])}
        with suppress(ValueError):  # before the first layer nothing pays any
            self.maps["attention"] = self._on_grids(view.attention(view.last)[0].mean((0, 1)))
        with suppress(ValueError):  # the strategy has no reference, or the grid no spectrum
            self.maps["evolution"] = self._evolution(view)

    def _on_grids(self, values: Tensor) -> Maps:
        pairs = zip(self.grids, self.on_grid, strict=True)
        return [values.float().cpu()[tokens].view(grid) for grid, tokens in pairs]

    def _evolution(self, view: View) -> Maps:
        maps, own = [], self.config.options
        options = own if isinstance(own, CLSEOptions) else CLSEOptions()
        for grid, tokens in zip(view.grids, view.on_grid, strict=True):
            volume = options.clse_fft_3d and grid[0] > 1
            before, after = (
                spectral_energy(features[:1, tokens], grid, options.clse_cutoff_ratio, volume)
                for features in (view.reference, view.features)
            )
            maps.append(evolution_factor(before, after, options.clse_temp)[0].cpu().view(grid))
        return maps


@dataclass(frozen=True)
class Look:
    """One question, how it was answered, and what was seen and left of its pictures.

    frames: the pictures, or the frames of a video, in order, each as its grid covers it. maps: by name, one
    [H, W] a frame. left: for each stage the layer it pruned at and, one a frame, which tokens stayed, [H, W].
    """

    question: str
    target: str
    answer: str
    frames: Sequence[Image.Image]
    maps: dict[str, list[Tensor]] = field(default_factory=dict)
    left: list[tuple[int, list[Tensor]]] = field(default_factory=list)


def look(question: str, target: str, answer: str, frames: Any, watch: Watch, record: RunRecord) -> Look:
    """Put together what was seen of a prompt that was prefilled alone."""
    left = []
    # Without a grid nothing was dropped anywhere, and there is nothing to show.
    for stage in record.stages if watch.grids else []:
        stays = torch.zeros(record.visual_sum)
        stays[stage.kept[0].cpu()] = 1
        left.append((stage.layer, _frames([stays[t].view(g) for g, t in zip(watch.grids, watch.on_grid, strict=True)])))
    maps = {name: _frames(values) for name, values in watch.maps.items()}
    return Look(question, target, answer, list(frames), maps, left)


def _frames(maps: Maps) -> list[Tensor]:
    return [frame for values in maps for frame in values]
