"""Runs as a Markdown table and as CSV."""

import io
import math
from collections.abc import Iterable, Sequence
from csv import DictWriter
from itertools import compress
from typing import Any

from pytablewriter import MarkdownTableWriter
from pytablewriter.style import Style

from comparison.columns import COLUMNS, DASH, Column, ComparedRun, compared
from comparison.published import Figures
from comparison.runs import Run, ordered

UNITS = ((1e12, "T"), (1e9, "G"), (1e6, "M"))


def unit(values: Iterable[float]) -> tuple[float, str]:
    """Return the factor and the letter, T, G or M, in which the largest of the values is at least 1."""
    largest = max((value for value in values if math.isfinite(value)), default=0)
    return next(((factor, letter) for factor, letter in UNITS if largest >= factor), UNITS[-1])


def table(runs: Sequence[Run], published: Figures | None = None) -> tuple[list[str], list[list[str]]]:
    """Return headers and rows as text, the unpruned run first.

    A column of operations has one unit, which its header names. An optional column without a value is left out.

    Args:
        runs: The runs of one task.
        published: What papers say of runs, by the names of these.
    """
    rows = compared(runs, published)
    filled = [(*_cells(column, rows), column.optional) for column in COLUMNS if column.header is not None]
    filled = [each for each in filled if not each[2] or set(each[1]) - {DASH}]
    cells = zip(*(cells for _, cells, _ in filled), strict=True)
    return [header for header, *_ in filled], [list(row) for row in cells]


def _cells(column: Column[ComparedRun], rows: Sequence[ComparedRun]) -> tuple[str, list[str]]:
    """Return a column's header and cells."""
    finished = [row.run.failed is None for row in rows]
    metric = next((row.run.metric for row in compress(rows, finished)), "accuracy")
    header = str(column.header).replace("{metric}", "" if metric == "accuracy" else f" ({metric})")
    shown = [column.get(row) if ok or column.of_failed else None for row, ok in zip(rows, finished, strict=True)]
    letter = ""
    if "{prefix}" in column.unit:
        factor, letter = unit(value for value in shown if value is not None)
        shown = [None if value is None else value / factor for value in shown]
    title = ", ".join(filter(None, (header, column.unit.replace("{prefix}", letter))))
    return title, [DASH if value is None else column.format(value) for value in shown]


def _escaped(text: str) -> str:
    """Return a text on one line that Markdown takes for no HTML and for no end of a cell."""
    return " ".join(text.split()).translate({ord(mark): f"&#{ord(mark)};" for mark in "&<|\\"})


def markdown(runs: Sequence[Run], published: Figures | None = None) -> str:
    """Return the table in Markdown, followed by the number of questions and a note on each run that failed."""
    headers, rows = table(runs, published)
    writer = MarkdownTableWriter(
        headers=[_escaped(header) for header in headers],
        value_matrix=[[_escaped(cell) for cell in row] for row in rows],
        type_hints=["String"] * len(headers),  # otherwise the writer parses numbers and formats them anew
        column_styles=[Style(), *[Style(align="right")] * (len(headers) - 1)],
    )
    failed = [run for run in ordered(runs) if run.failed is not None]
    notes = [f"- {_escaped(run.name)}: {_escaped(str(run.failed))}\n" for run in failed]
    counts = sorted({len(run.answers) for run in runs if run.failed is None})
    questions = f"\nQuestions a run: {' or '.join(map(str, counts))}.\n" if counts else ""
    return writer.dumps() + questions + ("\n" + "".join(notes) if notes else "")


def _flat(value: Any, name: str) -> dict[str, Any]:
    """Return the numbers inside a value, each under the name followed by its keys and, from 1, its positions."""
    parts: Iterable[tuple[Any, Any]]
    if isinstance(value, dict):
        parts = value.items()
    elif isinstance(value, list):
        parts = enumerate(value, 1)
    else:
        return {name: "" if isinstance(value, float) and math.isnan(value) else value}
    return {key: item for part, each in parts for key, item in _flat(each, f"{name}_{part}".strip("_")).items()}


def csv(runs: Sequence[Run], published: Figures | None = None) -> str:
    """Return one line a run, unrounded; a number that a run does not have is an empty cell."""
    rows: list[dict[str, Any]] = []
    for row in compared(runs, published):
        columns = [each for each in COLUMNS if each.key is not None and (row.run.failed is None or each.of_failed)]
        rows.append({})
        for column in columns:
            rows[-1] |= _flat(column.get(row), str(column.key))
    # Runs have different numbers of stages: the run with most columns leads.
    names = dict.fromkeys(name for row in sorted(rows, key=len, reverse=True) for name in row)
    text = io.StringIO()
    writer = DictWriter(text, list(names), restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()
