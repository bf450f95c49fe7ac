"""Runs as a Markdown table and as CSV."""

import io
import math
from collections.abc import Iterable, Sequence
from csv import DictWriter
from typing import Any

from pytablewriter import MarkdownTableWriter
from pytablewriter.style import Style

from comparison.intervals import Interval, interval, paired_interval
from comparison.runs import UNPRUNED, Run, ordered

DASH = "-"
UNITS = ((1e12, "T"), (1e9, "G"), (1e6, "M"))


def unit(values: Iterable[float]) -> tuple[float, str]:
    """The factor and the letter, T, G or M, in which the largest of the values is at least 1."""
    largest = max((value for value in values if math.isfinite(value)), default=0)
    return next(((factor, letter) for factor, letter in UNITS if largest >= factor), UNITS[-1])


def reference_of(runs: Sequence[Run]) -> Run | None:
    """The unpruned run, if it was made."""
    return next((run for run in runs if run.strategy == UNPRUNED and run.failed is None), None)


def share(run: Run, reference: Run | None) -> float:
    """Accuracy in percent of the unpruned, nan where that is none or zero."""
    return 100 * run.accuracy / reference.accuracy if reference and reference.accuracy else math.nan


def difference(run: Run, reference: Run | None) -> tuple[float, Interval]:
    """Accuracy minus the unpruned, with its paired interval; nan for the unpruned itself."""
    if reference is None or run is reference:
        return math.nan, (math.nan, math.nan)
    # a metric that is no mean over questions has no scores to pair
    scores = run.scores and reference.scores
    pair = paired_interval(run.scores, reference.scores) if scores else (math.nan, math.nan)
    return run.accuracy - reference.accuracy, pair


def scoring_share(run: Run) -> float:
    """Scoring's percent of the operations of the prefill."""
    return 100 * run.record["multiply_adds"]["scoring"] / run.operations if run.operations else math.nan


def _text(value: float, form: str) -> str:
    return DASH if math.isnan(value) else format(value, form)


def _range(bounds: Interval, form: str) -> str:
    return DASH if math.isnan(bounds[0]) else f"{bounds[0]:{form}} to {bounds[1]:{form}}"


def _cells(run: Run, reference: Run | None, prefill: float, decode: float) -> list[str]:
    change, bounds = difference(run, reference)
    record = run.record
    return [
        _text(run.accuracy, ".3f"),
        _range(interval(run.scores), ".3f"),
        _text(share(run, reference), ".1f"),
        _text(change, "+.3f") + ("" if math.isnan(bounds[0]) else f" ({_range(bounds, '+.3f')})"),
        "/".join(f"{round(kept, 1):g}" for kept in record["kept_tokens"] or [record["visual_tokens"]]),
        _text(record["tokens_per_layer"], ".1f"),
        _text(run.operations / prefill, ".3f"),
        _text(scoring_share(run), ".2f"),
        _text(record["multiply_adds"]["decode"] / decode, ".3f"),
        _text(record["cache_bytes"], ",.0f"),
        _text(run.seconds, ".3f"),
    ]


def table(runs: Sequence[Run]) -> tuple[list[str], list[list[str]]]:
    """Headers and rows as text, the unpruned first; each column of operations is in one unit, named in its header."""
    runs = ordered(runs)
    made, reference = [run for run in runs if run.failed is None], reference_of(runs)
    prefill, prefill_unit = unit(run.operations for run in made)
    decode, decode_unit = unit(run.record["multiply_adds"]["decode"] for run in made)
    metric = made[0].metric if made else "accuracy"
    headers = [
        "run",
        "accuracy" if metric == "accuracy" else f"accuracy ({metric})",
        "95 % interval",
        "% of unpruned",
        "difference to unpruned",
        "visual tokens kept",
        "mean visual tokens per layer",
        f"prefill, {prefill_unit} multiply-adds",
        "of it scoring, %",
        f"a decoded token, {decode_unit} multiply-adds",
        "KV bytes",
        "seconds a question",
    ]
    blank = [DASH] * (len(headers) - 1)
    rows = [blank if run.failed is not None else _cells(run, reference, prefill, decode) for run in runs]
    return headers, [[run.name, *row] for run, row in zip(runs, rows, strict=True)]


def _escaped(text: str) -> str:
    """Text on one line that Markdown takes for no HTML and for no end of a cell."""
    return " ".join(text.split()).translate({ord(mark): f"&#{ord(mark)};" for mark in "&<|\\"})


def markdown(runs: Sequence[Run]) -> str:
    """The table in Markdown, then a note on each run that failed."""
    headers, rows = table(runs)
    writer = MarkdownTableWriter(
        headers=[_escaped(header) for header in headers],
        value_matrix=[[_escaped(cell) for cell in row] for row in rows],
        type_hints=["String"] * len(headers),  # else numbers are read and written anew
        column_styles=[Style(), *[Style(align="right")] * (len(headers) - 1)],
    )
    failed = [run for run in ordered(runs) if run.failed is not None]
    notes = [f"- {_escaped(run.name)}: {_escaped(str(run.failed))}\n" for run in failed]
    return writer.dumps() + ("\n" + "".join(notes) if notes else "")


def _flat(value: Any, name: str) -> dict[str, Any]:
    """Everything inside a record as columns: keys and, from 1, positions in lists are appended to the name."""
    if isinstance(value, dict):
        return {key: item for part in value for key, item in _flat(value[part], f"{name}_{part}".lstrip("_")).items()}
    if isinstance(value, list):
        return {key: item for i, part in enumerate(value, 1) for key, item in _flat(part, f"{name}_{i}").items()}
    return {name: value}


def _columns(run: Run, reference: Run | None) -> dict[str, Any]:
    named = {name: getattr(run, name) for name in ("strategy", "budget", "task", "metric")}
    if run.failed is not None:
        return named | {"failed": run.failed}
    change, bounds = difference(run, reference)
    low, high = interval(run.scores)
    numbers = {
        "questions": len(run.answers),
        "accuracy": run.accuracy,
        "accuracy_low": low,
        "accuracy_high": high,
        "percent_of_unpruned": share(run, reference),
        "difference": change,
        "difference_low": bounds[0],
        "difference_high": bounds[1],
        "seconds": run.seconds,
        "multiply_adds_total": run.operations,
        "scoring_percent": scoring_share(run),
        **_flat(run.record, ""),
    }
    return named | {name: "" if math.isnan(number) else number for name, number in numbers.items()} | {"failed": ""}


def csv(runs: Sequence[Run]) -> str:
    """One line a run, unrounded; a number that a run does not have is an empty cell."""
    runs = ordered(runs)
    rows = [_columns(run, reference_of(runs)) for run in runs]
    # runs have different numbers of stages: the one with most columns leads
    names = dict.fromkeys(name for row in sorted(rows, key=len, reverse=True) for name in row)
    text = io.StringIO()
    writer = DictWriter(text, list(names), restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()
