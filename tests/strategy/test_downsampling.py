"""Grids of smaller pictures."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from strategy.evaluation.downsampling import nearest_grid, nearest_side


@pytest.mark.parametrize(
    ("tokens", "aspect", "grid"),
    [(64, 1, (8, 8)), (96, 1.5, (12, 8)), (50, 0.5, (5, 10)), (1, 1, (1, 1)), (0.3, 1, (1, 1)), (66, 1, (8, 8))],
)
def test_grids_by_hand(tokens, aspect, grid):
    assert nearest_grid(tokens, aspect) == grid


@pytest.mark.parametrize(("tokens", "side"), [(192, 14), (128, 11), (64, 8), (1, 1), (2, 1), (3, 2), (576, 24)])
def test_sides_by_hand(tokens, side):
    assert nearest_side(tokens) == side


@given(st.floats(4, 2000), st.floats(0.25, 4))
def test_a_grid_is_near_in_number_and_shape(tokens, aspect):
    rows, columns = nearest_grid(tokens, aspect)
    assert abs(rows * columns - tokens) <= max(rows, columns) / 2 + 0.5
    assert abs(rows - math.sqrt(tokens * aspect)) <= 1
    assert abs(columns - math.sqrt(tokens / aspect)) <= 1
