"""CLSE's maths against the published implementation's outputs and against the FFT that defines it."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from strategy import clse

GOLDEN = Path(__file__).parents[1] / "golden"
CASES = {case["name"]: case for case in json.loads((GOLDEN / "scores.json").read_text())}


@pytest.fixture(scope="module")
def golden():
    with np.load(GOLDEN / "scores.npz") as arrays:
        return {name: torch.from_numpy(arrays[name]) for name in arrays.files}


def grid_of(case):
    return case["t"], case["h"], case["w"]


@pytest.mark.parametrize("name", [name for name in CASES if name.startswith("energy")])
def test_energies_are_the_published_ones(golden, name):
    case = CASES[name]
    energy = clse.spectral_energy(
        golden[f"{name}_x"], grid_of(case), case["cutoff_ratio"], volume=case["kind"] == "volume"
    )
    torch.testing.assert_close(energy, golden[f"{name}_y"], rtol=1e-5, atol=0)


@pytest.mark.parametrize("name", [name for name in CASES if name.startswith("score")])
def test_scores_are_the_published_ones(golden, name):
    grid = grid_of(CASES[name])
    reference, current, attention = (golden[f"{name}_{part}"] for part in ("ref", "cur", "attn"))
    energies = [clse.spectral_energy(x, grid) for x in (reference, current)]
    torch.testing.assert_close(clse.evolution_factor(*energies), golden[f"{name}_evolution"], rtol=1e-3, atol=1e-6)
    scores = clse.score(reference, current, attention, grid)
    torch.testing.assert_close(scores, golden[f"{name}_score"], rtol=1e-3, atol=0)


def fft_energy(x, grid, cutoff_ratio, volume):
    """The definition, in float64: one minus a Gaussian over the centred spectrum."""
    axes = (1, 2, 3) if volume else (2, 3)
    sides = [grid[axis - 1] for axis in axes]
    sigma = cutoff_ratio * min(side // 2 for side in sides)
    square = sum(
        ((torch.arange(side, dtype=torch.float64) - side // 2) ** 2).view([-1 if a == axis else 1 for a in range(1, 4)])
        for axis, side in zip(axes, sides, strict=True)
    )
    gain = (1 - torch.exp(-square / (2 * sigma**2)))[None, ..., None]
    spectrum = torch.fft.fftshift(torch.fft.fftn(x.double().unflatten(1, grid), dim=axes), dim=axes)
    filtered = torch.fft.ifftn(torch.fft.ifftshift(spectrum * gain, dim=axes), dim=axes)
    return filtered.abs().mean(dim=-1).flatten(1)


@settings(max_examples=60)
@given(
    grid=st.tuples(st.integers(1, 5), st.integers(2, 13), st.integers(2, 13)),
    cutoff_ratio=st.floats(0.02, 2),
    volume=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_energy_is_what_the_fft_gives_on_any_grid(grid, cutoff_ratio, volume, seed):
    volume = volume and grid[0] > 1
    x = torch.randn(2, grid[0] * grid[1] * grid[2], 3, generator=torch.Generator().manual_seed(seed))
    energy = clse.spectral_energy(x, grid, cutoff_ratio, volume)
    torch.testing.assert_close(energy.double(), fft_energy(x, grid, cutoff_ratio, volume), rtol=1e-4, atol=1e-6)


def test_energy_is_float32_whatever_comes_in():
    x = torch.randn(1, 576, 8)
    energy = clse.spectral_energy(x.half(), (1, 24, 24))
    assert energy.dtype == torch.float32
    torch.testing.assert_close(energy, clse.spectral_energy(x.half().float(), (1, 24, 24)))


@pytest.mark.parametrize(("grid", "volume"), [((1, 24, 23), False), ((1, 1, 576), False), ((1, 24, 24), True)])
def test_a_grid_that_cannot_be_filtered_is_refused(grid, volume):
    with pytest.raises(ValueError, match="grid"):
        clse.spectral_energy(torch.randn(1, 576, 4), grid, volume=volume)


def test_a_thin_grid_is_ranked_by_attention_and_says_so():
    attention = torch.rand(1, 9)
    with pytest.warns(UserWarning, match="attention alone"):
        scores = clse.score(torch.randn(1, 9, 4), torch.randn(1, 9, 4), attention, (1, 1, 9))
    assert torch.equal(scores, attention)


def test_one_frame_is_filtered_as_one_frame():
    x, y, attention = torch.randn(1, 30, 4), torch.randn(1, 30, 4), torch.rand(1, 30)
    plane, volume = (clse.score(x, y, attention, (1, 5, 6), volume=volume) for volume in (False, True))
    assert torch.equal(plane, volume)


@pytest.mark.parametrize(
    ("depth", "layers"), [(32, (1, 11, 21)), (28, (1, 10, 19)), (36, (1, 13, 24)), (40, (1, 14, 27)), (12, (1, 4, 8))]
)
def test_default_layers_follow_the_depth(depth, layers):
    assert clse.default_prune_layers(depth) == layers


@pytest.mark.parametrize("depth", [1, 3, 4])
def test_a_decoder_too_shallow_for_the_default_layers_is_named(depth):
    with pytest.raises(ValueError, match=f"depth {depth} "):
        clse.default_prune_layers(depth)
