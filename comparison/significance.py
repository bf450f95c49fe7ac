"""Whether a strategy does better than random tokens, by a test over the questions."""

import math
from collections.abc import Sequence
from functools import lru_cache

import numpy as np
from scipy.stats import permutation_test

RESAMPLES = 9999
LEVEL = 0.05  # an adjusted p value below it is called better


@lru_cache(maxsize=1024)  # table, CSV and report need the same values
def p_value(scores: tuple[float, ...], draws: tuple[tuple[float, ...], ...]) -> float:
    """Return the one-sided p value of a permutation test within each question.

    Under the null hypothesis the strategy is one more draw of random tokens, so that of a question's scores any may be
    the strategy's; the statistic is the strategy's mean. With one draw and scores of 0 and 1 this is McNemar's exact
    test, up to the resampling. The seed is fixed; the smallest value is 1 / 10,000.

    Args:
        scores: The strategy's, one a question.
        draws: The scores of each draw of random tokens, over the same questions.

    Returns:
        The p value; 1 if no question tells the two apart, nan without scores or with one that is not finite.

    Raises:
        ValueError: The numbers of questions differ.
    """
    if any(len(draw) != len(scores) for draw in draws):
        raise ValueError(f"{len(scores)} scores cannot be paired with {[len(draw) for draw in draws]}")
    values = np.array([scores, *draws], dtype=float)
    if not draws or not scores or not np.isfinite(values).all():
        return math.nan
    # Questions on which all agree are the same under each permutation.
    values = values[:, (values != values[0]).any(axis=0)]
    if not values.size:
        return 1.0
    values = np.pad(values, ((0, 0), (0, 1)))  # scipy wants two questions
    found = permutation_test(
        values,
        lambda own, *_, axis: own.mean(axis=axis),
        permutation_type="samples",
        vectorized=True,
        n_resamples=RESAMPLES,
        batch=max(1, 1_000_000 // values.size),
        alternative="greater",
        rng=0,
    )
    return float(found.pvalue)


def holm(values: Sequence[float]) -> list[float]:
    """Return p values adjusted for their number by Holm's method, which needs no independence; nan stays nan."""
    adjusted = [math.nan] * len(values)
    order = sorted((value, at) for at, value in enumerate(values) if not math.isnan(value))
    largest = 0.0
    for rank, (value, at) in enumerate(order):
        largest = max(largest, min(1.0, value * (len(order) - rank)))
        adjusted[at] = largest
    return adjusted
