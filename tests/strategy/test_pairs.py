"""The rows that are chosen from a matrix of tests."""

from itertools import combinations, product

from hypothesis import given
from hypothesis import strategies as st
from pairs import cover


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
