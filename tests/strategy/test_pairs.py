"""The rows that are chosen from a matrix of tests."""

import shutil
import subprocess
import sys
from itertools import combinations, product
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pairs import BACKBONES, cover, share

TESTS = Path(__file__).parents[1]
MATRIX = """
import pytest

@pytest.mark.pairs
@pytest.mark.parametrize("z", [0, 1])
@pytest.mark.parametrize("y", [[0], [1], [2]])
@pytest.mark.parametrize("x", ["x0", "x1", "x2", "x3"])
def test_matrix(x, y, z):
    pass

@pytest.mark.shared
@pytest.mark.parametrize("row", range(4))
def test_shared(row):
    pass
"""


def pairs_of(rows):
    return {pair for row in rows for pair in combinations(enumerate(row), 2)}


@given(st.lists(st.tuples(*[st.integers(0, 3)] * 3), min_size=1))
def test_every_two_values_that_meet_still_meet(rows):
    chosen = cover(rows)
    assert chosen == sorted(set(chosen))
    assert pairs_of(rows[at] for at in chosen) == pairs_of(rows)


def test_a_product_shrinks_to_that_of_its_two_largest_columns():
    rows = list(product(range(12), range(13), range(2)))
    assert len(cover(rows)) == 12 * 13


def test_single_values_all_stay():
    assert cover([("a",), ("b",), ("a",)]) == [0, 1]


@pytest.mark.parametrize("count", range(1, 9))
def test_each_row_is_some_backbones(count):
    rows = list(range(count))
    assert sorted(row for backbone in BACKBONES for row in share(rows, backbone)) == rows


@pytest.mark.parametrize(("options", "count"), [((), 3 * 4 + 2), (("--full",), 3 * 4 * 2 + 4), (("-k", "x2"), 3 * 2)])
def test_of_a_marked_matrix_those_rows_are_collected(tmp_path, options, count):
    for name in ("conftest.py", "pairs.py"):
        shutil.copy(TESTS / name, tmp_path)
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers =\n  pairs\n  shared\npythonpath = .\n")
    (tmp_path / "llava").mkdir()
    (tmp_path / "llava/test_matrix.py").write_text(MATRIX)
    command = [sys.executable, "-m", "pytest", "--collect-only", "-q", *options]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout.count("llava/test_matrix.py::") == count
