"""Bootstrap intervals of an accuracy, over the questions."""

import math
from collections.abc import Sequence
from functools import lru_cache

import numpy as np
from scipy.stats import bootstrap

Interval = tuple[float, float]


@lru_cache(maxsize=1024)  # table, CSV and figure need the same intervals
def _interval(scores: tuple[float, ...]) -> Interval:
    values = np.asarray(scores, dtype=float)
    if not len(values) or not np.isfinite(values).all():
        return math.nan, math.nan
    if np.allclose(values, values[0], rtol=0, atol=1e-12):
        return float(values[0]), float(values[0])  # BCa divides by the spread of the resampled means
    batch = max(1, 1_000_000 // len(values))  # 9999 resamples at once do not fit for a large benchmark
    low, high = bootstrap((values,), np.mean, method="BCa", batch=batch, rng=0).confidence_interval
    return float(low), float(high)


def interval(scores: Sequence[float]) -> Interval:
    """Return the 95 % interval of the mean, by BCa with a fixed seed.

    Constant scores have their value as both bounds. Without scores, or with one that is not finite, they
    are nan.
    """
    return _interval(tuple(scores))


def paired_interval(scores: Sequence[float], reference: Sequence[float]) -> Interval:
    """Return the 95 % interval of the mean of the scores minus that of a reference, over the same questions.

    Questions are resampled with both of their scores, so this is the interval of the mean of the differences.

    Raises:
        ValueError: The numbers of questions differ.
    """
    if len(scores) != len(reference):
        raise ValueError(f"{len(scores)} scores cannot be paired with {len(reference)}")
    return _interval(tuple(one - other for one, other in zip(scores, reference, strict=True)))
