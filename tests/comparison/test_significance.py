"""Tests against random tokens, compared with what is known of them."""

import math

import numpy as np
import pytest
from scipy.stats import binomtest

from comparison import significance
from comparison.significance import holm, p_value


def scores(draw, share, count=300):
    return tuple((draw.random(count) < share).astype(float))


@pytest.mark.parametrize(("wins", "losses"), [(8, 2), (12, 9), (3, 7), (1, 0)])
def test_one_draw_is_mcnemars_exact_test(wins, losses):
    own, other = (1.0,) * wins + (0.0,) * losses, (0.0,) * wins + (1.0,) * losses
    exact = binomtest(wins, wins + losses, 0.5, alternative="greater").pvalue
    assert p_value(own, (other,)) == pytest.approx(exact, abs=0.02)
    assert p_value((*own, *[1.0] * 50), ((*other, *[1.0] * 50),)) == p_value(own, (other,)), "ties tell nothing"


def test_what_is_another_draw_is_called_better_in_five_of_a_hundred(monkeypatch):
    monkeypatch.setattr(significance, "RESAMPLES", 299)
    draw = np.random.default_rng(0)
    found = []
    for _ in range(150):
        # Some questions are easy, as for every method, so the draws are alike.
        easy = draw.random(120)
        runs = [tuple((draw.random(120) < easy).astype(float)) for _ in range(4)]
        found.append(p_value(runs[0], tuple(runs[1:])) < 0.05)
    assert 0.01 <= np.mean(found) <= 0.09


def test_more_draws_and_larger_differences_give_smaller_values():
    draw = np.random.default_rng(1)
    random = tuple(scores(draw, 0.5) for _ in range(3))
    little, much = scores(draw, 0.56), scores(draw, 0.75)
    assert p_value(much, random) == pytest.approx(1e-4)
    assert p_value(much, random) < p_value(little, random) < p_value(random[0], random[1:]) + 0.5
    assert p_value(tuple(1 - each for each in much), random) > 0.9


def test_questions_that_tell_nothing_apart():
    assert p_value((1.0, 0.0), ((1.0, 0.0), (1.0, 0.0))) == 1
    assert math.isnan(p_value((), ((),)))
    assert math.isnan(p_value((1.0, math.nan), ((1.0, 0.0),)))
    with pytest.raises(ValueError, match=r"2 scores cannot be paired with \[3\]"):
        p_value((1.0, 0.0), ((1.0, 0.0, 1.0),))


def test_holm_by_hand():
    assert holm([0.01, math.nan, 0.04, 0.03]) == pytest.approx([0.03, math.nan, 0.06, 0.06], nan_ok=True)
    assert holm([0.9, 0.8]) == [1, 1]
    assert holm([]) == []
