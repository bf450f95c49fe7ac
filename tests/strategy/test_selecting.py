"""Which tokens stay: ties, order, and the two ways to find the highest scores."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from strategy import selecting
from strategy.fusing import fusing


def rows(draw, length):
    return [draw(st.lists(st.integers(-3, 3), min_size=length, max_size=length)) for _ in range(2)]


@st.composite
def scored(draw):
    length = draw(st.integers(1, 30))
    return torch.tensor(rows(draw, length), dtype=torch.float32), draw(st.integers(1, length))


@given(scored())
def test_the_highest_stay_and_of_equal_ones_the_first(given):
    scores, count = given
    wanted = [sorted(sorted(range(len(row)), key=lambda at: -row[at])[:count]) for row in scores.tolist()]
    assert selecting.highest(scores, count).tolist() == wanted


@given(scored())
def test_ranks_are_places_in_a_stable_sort(given):
    scores, _ = given
    order = scores.sort(dim=1, descending=True, stable=True).indices
    assert torch.equal(selecting.ranks(scores).gather(1, order), torch.arange(scores.shape[1]).expand_as(order))


@given(scored())
def test_fused_or_not_the_same_stay(given):
    scores, count = given
    usual = selecting.highest(scores, count)
    with fusing(False):
        assert torch.equal(selecting.places(selecting.ranks(scores) < count, count), usual)
