"""Budgets at which strategies measure alike: in tokens of the mean layer, or in operations of the prefill."""

from collections.abc import Callable
from functools import partial

from comparison.cli import UNPRUNED_OPTIONS, OptionValues
from comparison.runs import NOMINAL, Run

QUESTIONS = 4  # on which a budget is measured
CLOSE = 0.005  # a share of the target; a budget that measures so near is taken
NEAR_ENOUGH = 0.05  # beyond it, a strategy does not reach the target
MEASURES: dict[str, Callable[[Run], float]] = {
    "tokens": lambda run: run.record["tokens_per_layer"],
    "operations": lambda run: run.operations,
}
REFERENCE = "uniform"  # whose measure is the target: it has the budget's tokens at every layer


def budget_for(target: float, first: int, largest: int, measure: Callable[[int], float]) -> int:
    """Return the budget whose measure is nearest to a target, by secants on whole numbers.

    Args:
        target: The measure to reach.
        first: The budget to try first.
        largest: The largest that is allowed; the smallest is 1.
        measure: Returns the measure of a budget; it does not fall as the budget grows.

    Raises:
        ValueError: No budget measures near the target.
    """
    low, high, at = 0, largest + 1, min(first, largest)
    measured: dict[int, float] = {}
    while low < at < high:
        measured[at] = measure(at)
        if abs(measured[at] - target) <= CLOSE * target:
            break
        if measured[at] < target:
            low = at
        else:
            high = at
        # A line through the two nearest measures; through one measure and zero, as long as there is only that.
        (one, value), *others = sorted(measured.items(), key=lambda pair: abs(pair[1] - target))
        other, other_value = next((pair for pair in others if pair[1] != value), (0, 0.0))
        if value != other_value:
            at = one + round((target - value) * (one - other) / (value - other_value))
        at = min(max(at, low + 1), high - 1)
    best = min(measured, key=lambda budget: abs(measured[budget] - target))
    if abs(measured[best] - target) > NEAR_ENOUGH * target:
        raise ValueError(f"no budget measures near {target:,.1f}: the nearest is {best}, with {measured[best]:,.1f}")
    return best


def calibrated(options: OptionValues, kind: str, largest: int, run: Callable[[OptionValues], Run]) -> OptionValues:
    """Return the options of a run with the budget at which it measures as REFERENCE does at its own.

    Args:
        options: The options; those of an unpruned run are returned as they are.
        kind: One of MEASURES.
        largest: The largest budget.
        run: Returns a run on some questions.

    Raises:
        ValueError: No budget measures so, or a run on the questions cannot be made.
    """
    if "keep_tokens" not in options:
        return options

    def measure(name: str, own: OptionValues, tokens: int) -> float:
        trial = run({**own, "strategy": name, "keep_tokens": tokens})
        if trial.failed is not None:
            raise ValueError(trial.failed)
        return MEASURES[kind](trial)

    budget, shared = options["keep_tokens"], {name: options[name] for name in UNPRUNED_OPTIONS if name in options}
    target = measure(REFERENCE, shared, budget)
    own = {name: value for name, value in options.items() if name != "seed"}  # all seeds keep as many
    found = budget_for(target, budget, largest, partial(measure, options["strategy"], own))
    return {**options, "keep_tokens": found, NOMINAL: budget}
