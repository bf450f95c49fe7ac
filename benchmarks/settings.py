"""What `benchmarks.curves` varies, and what it measures in what order."""

import argparse
from collections.abc import Callable
from typing import Any, NamedTuple

from benchmarks.command_line import pruned_options, ways_of


class Varied(NamedTuple):
    """A quantity that a curve varies.

    Attributes:
        values: What is measured on a GPU, the most telling first, since a run may be stopped.
        small: What is measured on a CPU.
        kind: The type of a value.
    """

    values: str
    small: str
    kind: Callable[[str], Any] = int


VARIED = {
    "batch": Varied("1,32,64,8,128,16,4,2", "1,2"),
    "visual": Varied("1024,256,4096,576,2304", "36,16"),
    "frames": Varied("16,4,64,32,8", "8,4"),
    "budget": Varied("0.334,0.112,1,0.05,0.223,0.75,0.5", "0.5,0.1", float),
}


class Setting(NamedTuple):
    """A prompt and a batch, and what is asked of them.

    Attributes:
        value: What is varied.
        batch: How many prompts are answered at once.
        size: Of the picture or video; None for that of the backbone's prompt.
        ways: The ways to answer, each with the value of its point and the options of `strategy.VTRConfig`.
    """

    value: float
    batch: int
    size: int | None
    ways: list[tuple[str, float, dict[str, Any]]]


def settings_of(given: argparse.Namespace) -> list[Setting]:
    """Return what to measure, in order.

    Raises:
        ValueError: A budget is no number, or none that the strategy takes.
    """
    ways = ways_of(given)
    if given.vary == "budget":
        rows: list[tuple[str, float, dict[str, Any]]] = [("unpruned", 1, ways["unpruned"])]
        rows += [("pruned", value, pruned_options(given.strategy, value)) for value in given.values]
        return [Setting(1, given.batch, None, rows)]
    by_batch = given.vary == "batch"
    return [
        Setting(
            value,
            value if by_batch else given.batch,
            None if by_batch else value,
            [(way, value, options) for way, options in ways.items()],
        )
        for value in given.values
    ]
