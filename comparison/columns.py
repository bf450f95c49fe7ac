"""The columns of a comparison: the Markdown table, the CSV and the report read this list."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import stdev
from typing import Any, Generic, NamedTuple, TypeVar

from comparison.intervals import interval, paired_interval
from comparison.published import Published
from comparison.runs import RANDOM, UNPRUNED, Run, ordered, unpruned_of
from comparison.significance import LEVEL, holm, p_value

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
        optional: Whether tables leave the column out where no row has a value.
    """

    key: str | None = None
    header: str | None = None
    unit: str = ""
    format: Callable[[Any], str] = str
    get: Callable[[Row], Any]
    of_failed: bool = False
    optional: bool = False


class ComparedRun(NamedTuple):
    """A run beside others on the same questions.

    Attributes:
        run: The run.
        unpruned: The unpruned run; None if there is none.
        random: Random tokens at the same budget; None if there are none.
        p: The p value of being better than random tokens, adjusted for the number of comparisons; else nan.
        published: What a paper says of the same model, task, strategy and budget; None if no paper is known to.
    """

    run: Run
    unpruned: Run | None
    random: Run | None = None
    p: float = math.nan
    published: Published | None = None

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
        return _difference(self.run, self.unpruned)

    @property
    def difference_to_random(self) -> dict[str, float]:
        """Return the accuracy minus that of random tokens, with its paired interval; nan for these and the unpruned."""
        return _difference(self.run, self.random)

    @property
    def published_values(self) -> dict[str, Any]:
        """Return the published percentage of the unpruned, and its source; nan and nothing if there is none."""
        percent, source = self.published or (math.nan, "")
        return {"percent_of_unpruned": percent, "source": source}

    @property
    def deviation(self) -> float:
        """Return the standard deviation of the accuracy over the seeds; nan for a single run."""
        accuracies = self.run.draw_accuracies
        return stdev(accuracies) if len(accuracies) > 1 else math.nan

    @property
    def kept_tokens(self) -> list[float]:
        """Return the visual tokens that each stage kept; without stages all tokens."""
        return self.run.record["kept_tokens"] or [self.run.record["visual_tokens"]]

    @property
    def scoring_percent(self) -> float:
        """Return the percentage of scoring in the operations of the prefill."""
        operations = self.run.operations
        return 100 * self.run.record["multiply_adds"]["scoring"] / operations if operations else math.nan


def _difference(run: Run, other: Run | None) -> dict[str, float]:
    """Return the accuracy of a run minus that of another one, with its paired interval."""
    if other is None or run is other:
        return {"": math.nan} | _bounds((math.nan, math.nan))
    # A metric that is no mean over questions has no scores to pair.
    paired = run.scores and other.scores
    bounds = paired_interval(run.scores, other.scores) if paired else (math.nan, math.nan)
    return {"": run.accuracy - other.accuracy} | _bounds(bounds)


def compared(runs: Sequence[Run], published: Mapping[str, Published] | None = None) -> list[ComparedRun]:
    """Return each run beside those that it is compared with, the unpruned run first.

    Args:
        runs: The runs of one task.
        published: Of runs, by their names.

    Raises:
        ValueError: As for `ordered`.
    """
    runs = ordered(runs)
    finished = [run for run in runs if run.failed is None]
    unpruned = unpruned_of(runs)
    random = {run.budget: run for run in finished if run.strategy == RANDOM}
    others = [random.get(run.budget) if run in finished and run.strategy != UNPRUNED else None for run in runs]
    values = holm(
        [
            p_value(run.scores, other.draws or (other.scores,)) if other and run is not other else math.nan
            for run, other in zip(runs, others, strict=True)
        ]
    )
    return [
        ComparedRun(run, unpruned, other, p, (published or {}).get(run.name))
        for run, other, p in zip(runs, others, values, strict=True)
    ]


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


def _better_text(p: float) -> str:
    return DASH if math.isnan(p) else f"{'yes' if p < LEVEL else 'not shown'}, p = {p:.4f}"


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
    Column(
        key="difference_to_random",
        header="difference to random",
        format=_difference_text,
        get=lambda row: row.difference_to_random,
        optional=True,
    ),
    Column(
        key="p_better_than_random",
        header="better than random?",
        format=_better_text,
        get=lambda row: row.p,
        optional=True,
    ),
    Column(
        key="accuracy_deviation",
        header="standard deviation over seeds",
        format=number(".4f"),
        get=lambda row: row.deviation,
        optional=True,
    ),
    Column(key="seeds", get=lambda row: len(row.run.draws) or 1),
    Column(
        key="published",
        header="published % of unpruned",
        format=lambda value: f"{value['percent_of_unpruned']:.1f} ({value['source']})" if value["source"] else DASH,
        get=lambda row: row.published_values,
        optional=True,
    ),
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
