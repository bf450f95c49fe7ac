"""Budgets that measure alike."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from comparison.calibration import budget_for, calibrated
from comparison.cli import config_of
from comparison.runs import NOMINAL, strategy_and_budget
from strategy import VTRConfig


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


def test_a_strategy_gets_the_budget_at_which_it_measures_as_uniform(run):
    asked = []

    def measured(options):
        asked.append(options)
        tokens = options["keep_tokens"] * (1 if options["strategy"] == "uniform" else 0.5)
        made = run(options["strategy"], options["keep_tokens"])
        made.record["tokens_per_layer"] = tokens
        return made

    options = {"strategy": "random", "keep_tokens": 64, "seed": 2, "engine": "eager"}
    found = calibrated(options, "tokens", 576, measured)
    assert found == options | {"keep_tokens": 128, NOMINAL: 64}
    assert strategy_and_budget(found) == ("random", 64)
    assert config_of(found) == VTRConfig(strategy="random", keep_tokens=128, seed=2, engine="eager")
    assert asked[0] == {"strategy": "uniform", "keep_tokens": 64, "engine": "eager"}
    assert all("seed" not in each for each in asked), "all seeds keep as many"
    assert calibrated({"enabled": False}, "tokens", 576, measured) == {"enabled": False}


def test_what_cannot_be_measured_is_refused_with_its_reason(failed):
    with pytest.raises(ValueError, match="a budget of 9000"):
        calibrated({"strategy": "fastv", "keep_tokens": 64}, "operations", 576, lambda options: failed())
