"""Made-up runs."""

import math

import numpy as np
import pytest

from comparison.runs import UNPRUNED, Run

LAYERS, QUESTIONS = 6, 200


def make(strategy=UNPRUNED, budget=None, accuracy=0.9, stages=None, **changes):
    """A run of so many right answers, that prunes right before layers to so many tokens."""
    stages = stages if stages is not None else {} if budget is None else {2: budget, 4: budget // 2}
    tokens, by_layer = 576, []
    for layer in range(LAYERS):
        tokens = stages.get(layer, tokens)
        by_layer.append(float(tokens))
    right = round(QUESTIONS * accuracy)
    record = {
        "visual_tokens": 576.0,
        "kept_tokens": [float(kept) for kept in stages.values()],
        "tokens_per_layer": sum(by_layer) / LAYERS,
        "tokens_by_layer": by_layer,
        "cache_length": by_layer[-1] + 40,
        "cache_bytes": 1234567.0 + tokens,
        "decoded_tokens": 2.5,
        "multiply_adds": {
            "vision": 3.1e9,
            "prefill": 1e7 * sum(by_layer) / LAYERS,
            "scoring": 4e7 if stages else 0.0,
            "head": 2.5e7,
            "decode": 8.125e6,
        },
        "seconds": {"vision": 0.02, "prefill": 0.09, "scoring": 0.001, "decode": 0.02},
    }
    fields = {
        "strategy": strategy,
        "budget": budget,
        "task": "shapes",
        "metric": "accuracy",
        "accuracy": right / QUESTIONS,
        "scores": (1.0,) * right + (0.0,) * (QUESTIONS - right),
        "answers": ("yes",) * right + ("no",) * (QUESTIONS - right),
        "targets": ("yes",) * QUESTIONS,
        "record": record,
        "seconds": 0.125,
    }
    return Run(**fields | changes)


def fail(strategy="fastv", budget=9000, reason="a budget of 9000 is more than 576 visual tokens"):
    return Run(strategy, budget, "shapes", "accuracy", math.nan, (), (), (), {}, math.nan, failed=reason)


@pytest.fixture
def run():
    """The maker of runs."""
    return make


@pytest.fixture
def failed():
    """The maker of failed runs."""
    return fail


@pytest.fixture
def runs():
    """An unpruned run, two strategies, one with one budget only, and a run that failed; the unpruned not first."""
    return [
        make("clse", 192, 0.88),
        make("clse", 64, 0.7),
        fail(),
        make("random", 192, 0.6),
        make(),
    ]


@pytest.fixture
def questions():
    """Right answers to 10000 questions, and to the same by a model that differs in a few."""
    draw = np.random.default_rng(3)
    right = draw.random(10_000) < 0.8
    other = np.where(draw.random(10_000) < 0.05, ~right, right)
    return right.astype(float), other.astype(float)
