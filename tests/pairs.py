"""Choose from a matrix of tests those that a plain run tries."""

from collections.abc import Hashable, Sequence
from itertools import combinations
from typing import TypeVar

BACKBONES = ("llava", "qwen2", "qwen3")  # which share what is tested of code that all run
Row = TypeVar("Row")


def share(rows: Sequence[Row], backbone: str) -> Sequence[Row]:
    """Choose the rows that one backbone tries, and another the next ones; a fourth one tries those of the first."""
    first = BACKBONES.index(backbone) if backbone in BACKBONES else 0
    return rows[first :: len(BACKBONES)]


def cover(rows: Sequence[Sequence[Hashable]]) -> list[int]:
    """Choose rows greedily until each pair of values in two columns that any row holds is in a chosen row.

    Args:
        rows: the values of the parameters of each test, in the same order for all.

    Returns:
        The indices of the chosen rows, ascending; the same ones at each call.
    """
    pairs = [set(combinations(enumerate(row), 2)) or {tuple(enumerate(row))} for row in rows]
    missing = set().union(*pairs)
    chosen = []
    while missing:
        best = max(range(len(rows)), key=lambda row: len(pairs[row] & missing))
        chosen.append(best)
        missing -= pairs[best]
    return sorted(chosen)
