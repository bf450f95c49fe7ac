"""Runs as one HTML file that needs no other file."""

import io
import re
from base64 import b64encode
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, PackageLoader, StrictUndefined
from matplotlib import rc_context
from matplotlib.figure import Figure

from comparison.intervals import interval
from comparison.published import Figures
from comparison.runs import UNPRUNED, Run, ordered, unpruned_of
from comparison.tables import table, unit
from strategy.evaluation.files import write_whole
from strategy.metrics.record import PARTS

# Okabe and Ito's colours without yellow, which is faint on white.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#7F7F7F")
MARKERS = "os^Dv<>Phd"
LINES = ("-", "--", ":")  # each is used with all colours before the next one
HATCHES = ("", "//", "xx", "..")
STYLE: dict[Any, Any] = {
    "font.size": 9,
    "svg.fonttype": "none",  # text stays text, which can be read aloud and searched
    "svg.hashsalt": "comparison",  # the same runs give the same file
    "text.parse_math": False,  # a dollar in a name is a dollar
    "axes.spines.top": False,
    "axes.spines.right": False,
    "hatch.linewidth": 0.5,
}
WIDTH = 4.8  # inches, in which 9 points can be read on a phone, too


@dataclass(frozen=True)
class Example:
    """One question that the unpruned and a pruned model answered.

    Attributes:
        question: The question.
        target: The right answer.
        unpruned, pruned: The two models' answers.
        strategy, budget: Of the pruned model.
        right: Whether the pruned answer is right.
        picture: A PNG.
    """

    question: str
    target: str
    unpruned: str
    pruned: str
    strategy: str
    budget: int
    right: bool
    picture: bytes

    @property
    def source(self) -> str:
        """Return the picture as a data URL."""
        return f"data:image/png;base64,{b64encode(self.picture).decode()}"


def _svg(figure: Figure, name: str, caption: str) -> str:
    """Return a figure as an element of HTML, whose ids begin with its name, since the page holds several figures."""
    text = io.StringIO()
    figure.savefig(text, format="svg", transparent=True, metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")))
    svg = text.getvalue()
    svg = re.sub(r'(\bid="|url\(#|href="#)', rf"\g<1>{name}-", svg[svg.index("<svg") :])
    svg = re.sub(r' width="[^"]*" height="[^"]*"', "", svg, count=1)  # the page sets the width
    return svg.replace("<svg ", f'<svg role="img" aria-label="{caption}" ', 1)


def _strategies(runs: Iterable[Run]) -> dict[str, list[Run]]:
    """Return the pruned runs of each strategy."""
    found: dict[str, list[Run]] = {}
    for run in runs:
        if run.strategy != UNPRUNED:
            found.setdefault(run.strategy, []).append(run)
    return found


def _line_style(number: int) -> dict[str, str]:
    """Return how the lines of a strategy are drawn, the same in every figure."""
    return {"color": COLOURS[number % len(COLOURS)], "linestyle": LINES[number // len(COLOURS) % len(LINES)]}


def _add_legend(figure: Figure, columns: int = 3) -> None:
    """Add the legend below the axes, where it hides no point."""
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=columns, frameon=False)


def _height(runs: Sequence[Run]) -> float:
    """Return the inches that the axes and a legend of three names a line need."""
    return 3.3 + 0.2 * (len(_strategies(runs)) // 3 + 1)


def _accuracy(runs: Sequence[Run]) -> Figure:
    """Plot the accuracy against the operations, with a line for each strategy."""
    figure = Figure((WIDTH, _height(runs)), layout="constrained")
    axes = figure.add_subplot()
    factor, letter = unit(run.operations for run in runs)

    def draw(line: list[Run], **style: Any) -> None:
        bounds = np.array([interval(run.scores) for run in line]).T
        accuracy = np.array([run.accuracy for run in line])
        error = np.maximum(np.stack([accuracy - bounds[0], bounds[1] - accuracy]), 0)
        shared: dict[str, Any] = {"capsize": 2.5, "elinewidth": 0.8, "markersize": 5, "linewidth": 1.4}
        axes.errorbar([run.operations / factor for run in line], accuracy, error, **shared, **style)

    if reference := unpruned_of(runs):
        axes.axhline(reference.accuracy, color="black", linestyle="--", linewidth=0.9)
        draw([reference], color="black", marker="*", linestyle="none", label=UNPRUNED)
    for number, (name, line) in enumerate(_strategies(runs).items()):
        line.sort(key=lambda run: run.operations)
        draw(line, **_line_style(number), marker=MARKERS[number % len(MARKERS)], label=name)
    axes.set(xlabel=f"operations of the prefill, {letter} multiply-adds", ylabel="accuracy")
    axes.grid(alpha=0.25)
    _add_legend(figure)
    return figure


def _layers(runs: Sequence[Run]) -> Figure:
    """Plot the visual tokens of each layer, for each strategy at the budget that most strategies have or near it."""
    figure = Figure((WIDTH, _height(runs)), layout="constrained")
    axes = figure.add_subplot()
    strategies = _strategies(runs)
    counts = Counter(run.budget or 0 for run in runs if run.strategy != UNPRUNED)
    common = max(counts, key=lambda budget: (counts[budget], budget), default=0)
    picked = [min(line, key=lambda run: abs((run.budget or 0) - common)) for line in strategies.values()]

    def draw(run: Run, **style: Any) -> None:
        tokens = run.record["tokens_by_layer"]
        axes.stairs(tokens, np.arange(len(tokens) + 1) - 0.5, baseline=None, label=run.name, **style)

    if reference := unpruned_of(runs):
        draw(reference, color="black", linestyle="--", linewidth=0.9)
    for number, run in enumerate(picked):
        # Later lines are thinner, so that lines that coincide stay visible.
        width = 1.2 + 4 * (len(picked) - 1 - number) / max(1, len(picked) - 1)
        draw(run, **_line_style(number), linewidth=width)
    axes.set(xlabel="layer of the decoder", ylabel="visual tokens it sees", ylim=(0, None))
    axes.grid(alpha=0.25)
    _add_legend(figure)
    return figure


def _parts(runs: Sequence[Run]) -> Figure:
    """Plot the operations of each run's prefill as a bar of its parts."""
    figure = Figure((WIDTH, 1.1 + 0.2 * len(runs)), layout="constrained")
    axes = figure.add_subplot()
    factor, letter = unit(run.operations for run in runs)
    rows, left = np.arange(len(runs)), np.zeros(len(runs))
    for number, part in enumerate(PARTS):
        width = np.array([run.record["multiply_adds"][part] / factor for run in runs])
        style: dict[str, Any] = {"color": COLOURS[number], "hatch": HATCHES[number], "edgecolor": "white"}
        axes.barh(rows, width, left=left, label=part, linewidth=0, **style)
        left += width
    axes.set_yticks(rows, [run.name for run in runs])
    axes.set(ylim=(len(runs) - 0.4, -0.6), xlabel=f"operations of the prefill, {letter} multiply-adds")
    _add_legend(figure, len(PARTS))
    return figure


def _figures(runs: Sequence[Run]) -> list[tuple[str, str]]:
    """Return each figure with its caption."""
    captions = {
        "Accuracy against the operations of the prefill, with 95 % intervals over the questions.": _accuracy,
        "Visual tokens that each layer sees. Where lines coincide, the thinner lies on top.": _layers,
        "Where the operations of the prefill go.": _parts,
    }
    with rc_context(STYLE):
        return [(_svg(draw(runs), f"plot{i}", text), text) for i, (text, draw) in enumerate(captions.items())]


def write(
    runs: Sequence[Run],
    examples: Sequence[Example],
    about: Mapping[str, str],
    path: Path,
    published: Figures | None = None,
) -> None:
    """Write the report.

    Args:
        runs: The runs of one task.
        examples: Questions to show.
        about: Facts about the runs, in order.
        path: The file to write.
        published: What papers say of runs, by the names of these.
    """
    runs = ordered(runs)
    finished = [run for run in runs if run.failed is None]
    headers, rows = table(runs, published)
    # Questions and answers come from data sets and models, so they are escaped.
    environment = Environment(loader=PackageLoader("comparison", "."), autoescape=True, undefined=StrictUndefined)
    page = environment.get_template("report.html.j2").render(
        about=about,
        figures=_figures(finished) if finished else [],
        headers=headers,
        rows=rows,
        failed=[run for run in runs if run.failed is not None],
        decided=[run for run in runs if run.graph_report],
        groups={
            "What pruning got right": [example for example in examples if example.right],
            "What pruning got wrong": [example for example in examples if not example.right],
        },
    )
    write_whole(path, page.encode(errors="replace"))  # an answer may hold half of a surrogate pair
