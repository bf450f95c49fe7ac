"""Intervals against what is known of them."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from comparison import intervals
from comparison.intervals import interval, paired_interval


def test_a_large_sample_has_the_normal_interval(questions):
    scores, _ = questions
    mean = scores.mean()
    half = 1.959964 * math.sqrt(mean * (1 - mean) / len(scores))
    assert interval(scores) == pytest.approx((mean - half, mean + half), abs=0.05 * half)


def test_coverage_is_near_95_percent():
    draw = np.random.default_rng(0)
    bounds = [interval((draw.random(100) < 0.7).astype(float)) for _ in range(200)]
    assert 0.90 <= np.mean([low <= 0.7 <= high for low, high in bounds]) <= 0.99


@pytest.mark.parametrize("scores", [(1.0,) * 50, (0.0,) * 50, (0.3,) * 7, (1.0,), (0.1 + 0.2, 0.3)])
def test_constant_scores_give_the_point(scores):
    assert interval(scores) == pytest.approx((scores[0], scores[0]), abs=0)
    assert paired_interval(scores, scores) == (0, 0)


@pytest.mark.parametrize("scores", [(), (1.0, math.nan), (math.inf, 0.0)])
def test_no_interval_without_numbers(scores):
    assert all(math.isnan(bound) for bound in interval(scores))


def test_pairing_narrows_correlated_scores(questions):
    scores, other = questions
    low, high = paired_interval(other, scores)
    assert low <= other.mean() - scores.mean() <= high
    one, two = interval(scores), interval(other)
    unpaired = math.hypot(one[1] - one[0], two[1] - two[0])
    assert high - low < 0.6 * unpaired
    shuffled = np.random.default_rng(1).permutation(scores)
    low, high = paired_interval(other, shuffled)
    assert high - low == pytest.approx(unpaired, rel=0.05)


def test_the_seed_is_fixed(questions):
    scores = questions[0][:100] + np.linspace(0, 1, 100)
    first = interval(scores)
    intervals._interval.cache_clear()
    assert interval(scores) == first


def test_pairs_need_the_same_questions():
    with pytest.raises(ValueError, match="3 scores cannot be paired with 2"):
        paired_interval((1.0, 0.0, 1.0), (1.0, 0.0))


def test_one_changed_answer_of_many():
    scores = (1.0,) * 399 + (0.0,)
    low, high = paired_interval(scores, (1.0,) * 400)
    assert low < -1 / 400 <= high <= 0


@given(st.lists(st.sampled_from([0.0, 0.5, 1.0]), min_size=1, max_size=20))
def test_the_interval_is_finite_repeatable_and_within_the_scores(scores):
    low, high = interval(scores)
    assert min(scores) <= low <= high <= max(scores)
    assert interval(np.array(scores)) == (low, high)
