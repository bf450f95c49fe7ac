"""Published figures of pruned models, shown beside what is measured here and never mixed with it."""

from collections.abc import Mapping, Sequence
from csv import DictReader
from importlib.resources import files
from pathlib import PurePath
from typing import NamedTuple

from comparison.runs import Run


class Published(NamedTuple):
    """What a paper's table says of one model, task, strategy and budget.

    Attributes:
        percent: Its figure in percent of its own unpruned figure.
        source: The paper.
    """

    percent: float
    source: str


Figures = Mapping[str, Published]
"""Published figures by the names of runs."""


def published_lines() -> list[dict[str, str]]:
    """Return the lines of published.csv: a model, task, strategy and budget, the figure, the unpruned, the source."""
    return list(DictReader(files("comparison").joinpath("published.csv").read_text("utf-8").splitlines()))


def published_figures(pretrained: str, runs: Sequence[Run]) -> dict[str, Published]:
    """Return the published figures of runs on all questions of a task at the published budgets.

    Args:
        pretrained: Folder or hub id of the weights; its last part is the model's name.
        runs: The runs of one task.
    """
    model = PurePath(pretrained).name.lower()
    found = {}
    for line in published_lines():
        for run in runs:
            key = (line["model"], line["task"], line["strategy"], line["budget"])
            if key == (model, run.task, run.strategy, str(run.budget)):
                percent = 100 * float(line["figure"]) / float(line["unpruned"])
                found[run.name] = Published(percent, line["source"])
    return found
