"""CLSE, Cross-Layer Spectral Evolution (ECCV 2026, arXiv 2606.24165).

A visual token matters if its high-frequency content changes from one decoder layer to a later one
and if the last prompt token attends to it.
"""

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import ClassVar

import torch
from torch import Tensor

from strategy.base import Strategy, View
from strategy.kernels.compile import compilable
from strategy.options import Options, flag, option, positive
from strategy.plan import Facts, Grid, Plan, StageBudgets
from strategy.registry import register

# Tokens kept of LLaVA's 576, and shares kept of an image's own tokens, after each of the three stages
# (section 4, implementation details). Either knob of a row selects it, on every backbone.
PUBLISHED = {
    (192, 0.334): ((330, 210, 62), (0.57, 0.36, 0.098)),
    (128, 0.223): ((220, 140, 41), (0.38, 0.24, 0.066)),
    (64, 0.112): ((110, 70, 20), (0.19, 0.12, 0.034)),
}
# What each stage keeps, in budgets, between and beyond these rows.
STAGE_SHARES = (1.72, 1.09, 0.32)
PUBLISHED_LAYERS = {32: (1, 11, 21), 28: (1, 10, 19), 36: (1, 13, 24)}
VIDEO_LAYER, VIDEO_BUDGET = 3, 194


def spectral_energy(x: Tensor, grid: Grid, cutoff_ratio: float = 0.1, volume: bool = False) -> Tensor:
    """Compute the high-pass energy of each token on its grid.

    The filter's gain is 1 - exp(-f^2 / (2 sigma^2)) over signed integer frequencies, with sigma = cutoff_ratio *
    min(H // 2, W // 2), per frame; with `volume` over (T, H, W) at once and T // 2 in the minimum too. The Gaussian is
    a product of one factor for each axis, so the filtered signal is x minus x multiplied by a small circulant matrix
    along each axis, which is exact and needs no FFT.

    Args:
        x: Features [B, N, C] of N = T * H * W tokens.
        grid: (T, H, W).
        cutoff_ratio: Width of the Gaussian, see above.
        volume: Whether the filter spans the frames too.

    Returns:
        float32 [B, N], the mean over channels of the filtered signal's absolute value.

    Raises:
        ValueError: The grid does not hold N tokens, or a filtered side is under 2.
    """
    frames, height, width = grid
    if x.dim() != 3 or x.shape[1] != frames * height * width:
        raise ValueError(f"features of shape {tuple(x.shape)} do not lie on grid {grid}: want [B, T * H * W, C]")
    sides = grid if volume else (height, width)
    if min(sides) < 2:
        raise ValueError(f"grid {grid}: each filtered side must be at least 2")
    sigma = cutoff_ratio * min(side // 2 for side in sides)
    return _energy(x, grid, [low_pass(side, sigma, x.device) for side in sides])


@compilable
def _energy(x: Tensor, grid: Grid, filters: Sequence[Tensor]) -> Tensor:
    """Compute `spectral_energy` with the low-pass matrices of the filtered axes, which are the grid's last."""
    signal = x.float().unflatten(1, grid)
    low = signal
    for axis, matrix in zip((3, 2, 1), reversed(filters), strict=False):
        # All later axes are columns of one product, so that nothing needs to be transposed.
        low = (matrix @ low.flatten(axis + 1)).view(signal.shape)
    return (signal - low).abs().mean(dim=-1).flatten(1)


@cache
def low_pass(side: int, sigma: float, device: torch.device) -> Tensor:
    """Return the circulant matrix [side, side] that multiplies frequency k by exp(-k^2 / (2 sigma^2)).

    The matrix stays in the cache for good, since captured graphs read it.
    """
    with torch.inference_mode(False):
        position = torch.arange(side, device=device)
        frequency = (position - side // 2).double()
        gain = torch.exp(-frequency.square() / (2 * sigma**2))
        phase = 2 * math.pi / side * (position[:, None] * frequency)
        kernel = (gain * phase.cos()).mean(dim=-1).float()
        return kernel[(position[:, None] - position) % side]


@compilable
def evolution_factor(reference: Tensor, current: Tensor, temp: float = 0.1) -> Tensor:
    """Compute how much each token's energy changed between two layers, as a factor in (0, 1).

    Args:
        reference: Energies [B, N] at the reference layer.
        current: Energies [B, N] at the current layer.
        temp: Temperature of the sigmoid.

    Returns:
        float32 [B, N], sigmoid(z / temp) of the relative change, standardised over the N tokens of a row.
    """
    reference, current = reference.float(), current.float()
    change = (current - reference).abs() / (reference.mean(-1, keepdim=True) + reference + 1e-6)
    change = change.clamp(max=1)
    z = (change - change.mean(-1, keepdim=True)) / (change.std(-1, keepdim=True) + 1e-6)
    return torch.sigmoid(z / temp)


def score(
    reference_features: Tensor,
    current_features: Tensor,
    attention: Tensor,
    grid: Grid,
    cutoff_ratio: float = 0.1,
    temp: float = 0.1,
    volume: bool = False,
) -> Tensor:
    """Score each token of one image by CLSE: spectral evolution times attention.

    On a grid with a side under 2, which has no spectrum to speak of, the score is the attention, with a warning. A
    single frame is filtered as a frame, also with `volume`.

    Args:
        reference_features: Features [B, N, C] at the reference layer.
        current_features: Features [B, N, C] at the current layer.
        attention: Attention [B, N] of the last prompt token.
        grid: (T, H, W).
        cutoff_ratio: See `spectral_energy`.
        temp: See `evolution_factor`.
        volume: See `spectral_energy`.

    Returns:
        float32 [B, N].
    """
    volume = volume and grid[0] > 1
    if min(grid[1:]) < 2:
        warnings.warn(f"grid {grid} is too thin for a spectrum: attention alone ranks its tokens", stacklevel=2)
        return attention.float()
    energies = spectral_energy(torch.cat([reference_features, current_features]), grid, cutoff_ratio, volume)
    return evolution_factor(*energies.split([len(reference_features), len(current_features)]), temp) * attention.float()


def default_prune_layers(depth: int) -> tuple[int, ...]:
    """Return the three layers to prune at in a decoder of `depth` layers.

    These are the published ones for depths 28, 32 and 36, else 1, round(0.36 depth) and round(0.67 depth).

    Raises:
        ValueError: The decoder is too shallow to hold three increasing layers.
    """
    layers = PUBLISHED_LAYERS.get(depth, (1, round(0.36 * depth), round(0.67 * depth)))
    if not layers[0] < layers[1] < layers[2] < depth:
        raise ValueError(
            f"a decoder of depth {depth} is too shallow for three default stages: "
            "give prune_layer (and keep_tokens or retain_ratio) yourself"
        )
    return layers


@dataclass(frozen=True, init=False)
class CLSEOptions(Options):
    """The options of CLSE, see `score`."""

    clse_cutoff_ratio: float = option(
        0.1, positive, "Width of the Gaussian low-pass that is subtracted, as a share of half the grid's shorter side."
    )
    clse_temp: float = option(0.1, positive, "Temperature of the sigmoid that makes a factor of the evolution.")
    clse_fft_3d: bool = option(
        False, flag, "Whether a video is filtered over frames, rows and columns at once instead of frame by frame."
    )


@register("clse")
class CLSE(Strategy):
    """Spectral evolution times attention at the first stage, attention at the later ones (section 3)."""

    options_type: ClassVar[type[Options]] = CLSEOptions

    def plan(self, facts: Facts) -> Plan:
        config = self.config
        layers = config.prune_layer or self.prune_layers(
            facts, (VIDEO_LAYER,) if facts.video else default_prune_layers(facts.depth)
        )
        # On videos the two layers that are compared follow each other.
        reference = layers[0] - 1 if facts.video else 0
        if config.ref_layers is not None:
            reference = config.ref_layers[0]
        return Plan.resolve(layers, reference, self._budgets(facts), facts)

    def _budgets(self, facts: Facts) -> StageBudgets:
        budget = self.budget(tokens=VIDEO_BUDGET if facts.video else 192)
        for (tokens, ratio), (counts, shares) in PUBLISHED.items():
            if budget.tokens == (tokens,) or budget.ratio == (ratio,):
                return replace(budget, stages=shares if facts.own_size else counts)
        return replace(budget, weights=STAGE_SHARES)

    def score(self, view: View) -> Tensor:
        attention = view.attention(view.last).mean(dim=(1, 2))
        if view.stage > 0:
            return attention
        options = self.options.clse_cutoff_ratio, self.options.clse_temp, self.options.clse_fft_3d
        if len(view.grids) == 1 and len(view.on_grid[0]) == attention.shape[1]:
            return score(view.reference, view.features, attention, view.grids[0], *options)
        # Tokens on no grid have no spectrum: their factor is one.
        scores = attention.clone()
        for grid, tokens in zip(view.grids, view.on_grid, strict=True):
            reference, features = view.reference[:, tokens], view.features[:, tokens]
            scores[:, tokens] = score(reference, features, attention[:, tokens], grid, *options)
        return scores
