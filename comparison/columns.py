"""The columns of a comparison: the Markdown table, the CSV and the report read this list."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Generic, NamedTuple, TypeVar

from comparison.intervals import interval, paired_interval
from comparison.runs import Run

DASH = "-"
Row = TypeVar("Row")


@dataclass(frozen=True, kw_only=True)
class Column(Generic[Row]):
    """One column, in tables for people, in the CSV, or in both.

    Attributes:
        key: Name in the CSV. The parts of a list or mapping have the names `key_1` or `key_low`; without a key, as in
            "", those of a mapping have their own names. None for a column that the CSV does not have.
        header: Title in tables; None for a column that tables do not have. `{metric}` stands for the name of an
            accuracy that is not called so.
        unit: Follows the header. `{prefix}` in it stands for T, G or M: all values are divided by that, so that the
            largest is at least 1.
        format: Returns a value as the text of a cell.
        get: Returns the value of a row: a number or a text, or a list or mapping of those. A number that a row does not
            have is nan.
        of_failed: Whether a run that failed has a value.
    """

    key: str | None = None
    header: str | None = None
    unit: str = ""
    format: Callable[[Any], str] = str
    get: Callable[[Row], Any]
    of_failed: bool = False


class ComparedRun(NamedTuple):
    """A run beside the unpruned run on the same questions, which is None if there is none."""

    run: Run
    unpruned: Run | None

    @property
    def interval(self) -> dict[str, float]:
        """Return the 95 % interval of the accuracy."""
        return _bounds(interval(self.run.scores))

    @property
    def percent_of_unpruned(self) -> float:
        """Return the accuracy in percent of the unpruned; nan where that is missing or zero."""
        unpruned = self.unpruned
        return 100 * self.run.accuracy / unpruned.accuracy if unpruned and unpruned.accuracy else math.nan

    @property
    def difference(self) -> dict[str, float]:
        """Return the accuracy minus the unpruned, with its paired interval; nan for the unpruned run itself."""
        run, unpruned = self
        if unpruned is None or run is unpruned:
            return {"": math.nan} | _bounds((math.nan, math.nan))
        # A metric that is no mean over questions has no scores to pair.
        paired = run.scores and unpruned.scores
        bounds = paired_interval(run.scores, unpruned.scores) if paired else (math.nan, math.nan)
        return {"": run.accuracy - unpruned.accuracy} | _bounds(bounds)

    @property
    def kept_tokens(self) -> list[float]:
        """Return the visual tokens that each stage kept; without stages all tokens."""
        return self.run.record["kept_tokens"] or [self.run.record["visual_tokens"]]

    @property
    def scoring_percent(self) -> float:
        """Return the percentage of scoring in the operations of the prefill."""
        operations = self.run.operations
        return 100 * self.run.record["multiply_adds"]["scoring"] / operations if operations else math.nan


def _bounds(bounds: tuple[float, float]) -> dict[str, float]:
    return dict(zip(("low", "high"), bounds, strict=True))


def number(form: str) -> Callable[[float], str]:
    """Return a function that writes a number by a format specification, and nan as a dash."""
    return lambda value: DASH if math.isnan(value) else format(value, form)


def _interval_text(bounds: Mapping[str, float]) -> str:
    return DASH if math.isnan(bounds["low"]) else f"{bounds['low']:.3f} to {bounds['high']:.3f}"


def _difference_text(value: Mapping[str, float]) -> str:
    bounds = "" if math.isnan(value["low"]) else f" ({value['low']:+.3f} to {value['high']:+.3f})"
    return number("+.3f")(value[""]) + bounds


def _stages_text(kept: list[float]) -> str:
    return "/".join(f"{round(each, 1):g}" for each in kept)


COLUMNS: list[Column[ComparedRun]] = [
    Column(header="run", get=lambda row: row.run.name, of_failed=True),
    Column(key="strategy", get=lambda row: row.run.strategy, of_failed=True),
    Column(key="budget", get=lambda row: row.run.budget, of_failed=True),
    Column(key="task", get=lambda row: row.run.task, of_failed=True),
    Column(key="metric", get=lambda row: row.run.metric, of_failed=True),
    Column(key="questions", get=lambda row: len(row.run.answers)),
    Column(key="accuracy", header="accuracy{metric}", format=number(".3f"), get=lambda row: row.run.accuracy),
    Column(key="accuracy", header="95 % interval", format=_interval_text, get=lambda row: row.interval),
    Column(
        key="percent_of_unpruned",
        header="% of unpruned",
        format=number(".1f"),
        get=lambda row: row.percent_of_unpruned,
    ),
    Column(key="difference", header="difference to unpruned", format=_difference_text, get=lambda row: row.difference),
    # Tables have this column at their end.
    Column(key="seconds", get=lambda row: row.run.seconds),
    # The CSV has all that a record holds, see below.
    Column(header="visual tokens kept", format=_stages_text, get=lambda row: row.kept_tokens),
    Column(
        header="mean visual tokens per layer",
        format=number(".1f"),
        get=lambda row: row.run.record["tokens_per_layer"],
    ),
    Column(
        key="multiply_adds_total",
        header="prefill",
        unit="{prefix} multiply-adds",
        format=number(".3f"),
        get=lambda row: row.run.operations,
    ),
    Column(
        key="scoring_percent",
        header="of it scoring",
        unit="%",
        format=number(".2f"),
        get=lambda row: row.scoring_percent,
    ),
    Column(
        header="a decoded token",
        unit="{prefix} multiply-adds",
        format=number(".3f"),
        get=lambda row: row.run.record["multiply_adds"]["decode"],
    ),
    Column(header="KV bytes", format=number(",.0f"), get=lambda row: row.run.record["cache_bytes"]),
    Column(header="seconds a question", format=number(".3f"), get=lambda row: row.run.seconds),
    Column(key="", get=lambda row: row.run.record),
    Column(key="failed", get=lambda row: row.run.failed, of_failed=True),
]
