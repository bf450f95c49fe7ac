"""Budgets that measure alike."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from comparison.calibration import budget_for


@given(st.integers(1, 576), st.floats(0.2, 3), st.floats(0, 500), st.integers(1, 576))
def test_of_all_budgets_the_nearest_is_found_or_one_as_near_as_asked_for(wanted, slope, offset, first):
    asked = []

    def measure(budget):
        asked.append(budget)
        return offset + slope * budget

    target = offset + slope * wanted
    found = budget_for(target, first, 576, measure)
    assert abs(measure(found) - target) <= 0.005 * target
    assert len(asked) <= 8


def test_a_measure_with_steps_is_met_as_nearly_as_it_can_be():
    assert budget_for(100, 64, 576, lambda budget: 10.0 * (budget // 8)) in range(80, 88)


def test_what_the_first_layers_alone_exceed_is_refused():
    with pytest.raises(ValueError, match=r"no budget measures near 64\.0: the nearest is 1, with 200\.0"):
        budget_for(64, 64, 576, lambda budget: 200.0 + budget / 1000)
