"""One evaluated run, and how it is stored."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import Any, TypedDict

from strategy.evaluation.files import write_whole
from strategy.metrics.record import PARTS

UNPRUNED = "unpruned"
DOWNSAMPLE = "downsample"  # the unpruned model, on smaller pictures with as many tokens as the budget says
NOMINAL = "nominal_budget"  # the option of a calibrated run that names the budget which it is compared at
RANDOM = "random"  # the strategy that others are compared with


class RecordMeans(TypedDict, total=False):
    """Means over questions, as `RunRecord.means` returns and describes them; empty for a run that failed."""

    visual_tokens: float
    kept_tokens: list[float]
    tokens_by_layer: list[float]
    tokens_per_layer: float
    cache_length: float
    cache_bytes: float
    decoded_tokens: float
    multiply_adds: dict[str, float]
    seconds: dict[str, float]


@dataclass(frozen=True)
class Run:
    """One strategy at one budget on one task.

    Attributes:
        strategy: Its name, or "unpruned".
        budget: Visual tokens; None if unpruned.
        task: The task's name.
        metric: The name of the accuracy.
        accuracy: Its value.
        scores: One a question; empty if the metric is no mean over questions.
        answers, targets: One a question.
        record: What the model kept and what that cost.
        seconds: Wall time a question.
        graph_report: What the graph engine decided, and why; see `RunRecord.graph_report`.
        nominal_tokens: What a budget is counted against, see `Facts`; 0 if the run was stored without it.
        samples: One a question, what lmms-eval logs of it, as a line of JSON; for `export`.
        draws: The scores of each seed, where the run is the mean of several; see `pool`.
        draw_accuracies: The accuracy of each seed, likewise.
        failed: Why the run could not be made; then accuracy and seconds are nan, and the rest is empty.
    """

    strategy: str
    budget: int | None
    task: str
    metric: str
    accuracy: float
    scores: tuple[float, ...]
    answers: tuple[str, ...]
    targets: tuple[str, ...]
    record: RecordMeans
    seconds: float
    failed: str | None = None
    graph_report: str = ""
    nominal_tokens: int = 0
    samples: tuple[str, ...] = ()
    draws: tuple[tuple[float, ...], ...] = ()
    draw_accuracies: tuple[float, ...] = ()

    @property
    def name(self) -> str:
        """Return strategy and budget."""
        return run_name(self.strategy, self.budget)

    @property
    def ratio(self) -> float:
        """Return the budget as a share of the visual tokens; 1 if unpruned, nan if that is not known."""
        if self.budget is None:
            return 1.0
        return self.budget / self.nominal_tokens if self.nominal_tokens else math.nan

    @property
    def operations(self) -> float:
        """Return the multiply-adds of a question's prefill, all parts together; nan if the run failed."""
        return math.nan if self.failed is not None else float(sum(self.record["multiply_adds"][part] for part in PARTS))


def run_name(strategy: str, budget: int | None) -> str:
    """Return the name of a run in tables and figures."""
    return strategy if budget is None else f"{strategy} {budget}"


def strategy_and_budget(options: Mapping[str, Any]) -> tuple[str, int | None]:
    """Return the strategy and the budget of a run with these options; see DOWNSAMPLE and NOMINAL for two of them."""
    if DOWNSAMPLE in options:
        return DOWNSAMPLE, options[DOWNSAMPLE]
    if not options.get("enabled", True):
        return UNPRUNED, None
    return options["strategy"], options.get(NOMINAL, options["keep_tokens"])


def run_of(options: Mapping[str, Any], **fields: Any) -> Run:
    """Return a run with these pruning options, and with the other fields of `Run`."""
    return Run(*strategy_and_budget(options), **fields)


def pool(runs: Sequence[Run]) -> Run:
    """Return runs of one strategy and budget that differ in their seed as one, of the means over them.

    Answers, samples and decisions are those of the first seed. Of runs that failed the first is returned as it is.
    """
    first = next((run for run in runs if run.failed is not None), runs[0])
    if len(runs) == 1 or first.failed is not None:
        return first
    return replace(
        first,
        accuracy=fmean(run.accuracy for run in runs),
        scores=tuple(map(fmean, zip(*(run.scores for run in runs), strict=True))),
        record=_mean_of([run.record for run in runs]),
        seconds=fmean(run.seconds for run in runs),
        draws=tuple(run.scores for run in runs),
        draw_accuracies=tuple(run.accuracy for run in runs),
    )


def _mean_of(values: Sequence[Any]) -> Any:
    """Return the mean of numbers, or of each number inside lists or mappings that are alike."""
    if isinstance(values[0], Mapping):
        return {name: _mean_of([each[name] for each in values]) for name in values[0]}
    if isinstance(values[0], list):
        return [_mean_of(each) for each in zip(*values, strict=True)]
    return fmean(values)


def pooled(runs: Sequence[Run]) -> list[Run]:
    """Return the runs with those of one strategy and budget pooled, see `pool`, in the order of the first of each."""
    groups: dict[str, list[Run]] = {}
    for run in runs:
        groups.setdefault(run.name, []).append(run)
    return [pool(group) for group in groups.values()]


def unpruned_of(runs: Sequence[Run]) -> Run | None:
    """Return the unpruned run; None if there is none, or if it failed."""
    return next((run for run in runs if run.strategy == UNPRUNED and run.failed is None), None)


def ordered(runs: Sequence[Run]) -> list[Run]:
    """Return the unpruned run first, the rest as given; ValueError if they do not share a task and its questions."""
    finished = [run for run in runs if run.failed is None]
    for run in finished:
        first = finished[0]
        if (run.task, run.metric, run.targets) != (first.task, first.metric, first.targets):
            raise ValueError(
                f"{run.name} and {first.name} were not run on the same questions of the same task: compare them apart"
            )
    return sorted(runs, key=lambda run: run.strategy != UNPRUNED)


def _encoded(value: Any) -> Any:
    """Return the value with null for each nan, which JSON does not have."""
    if isinstance(value, dict):
        return {key: _encoded(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_encoded(item) for item in value]
    return None if isinstance(value, float) and math.isnan(value) else value


def _decoded(value: Any) -> Any:
    """Return the value with nan for each null."""
    if isinstance(value, dict):
        return {key: _decoded(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_decoded(item) for item in value]
    return math.nan if value is None else value


def save(run: Run, path: Path) -> None:
    """Store a run as JSON; ValueError if a number is infinite."""
    text = json.dumps(_encoded(asdict(run)), indent=1, allow_nan=False)
    write_whole(path, f"{text}\n".encode())


def load(path: Path) -> Run:
    """Read a stored run; ValueError if the file holds none."""
    try:
        fields: dict[str, Any] = json.loads(path.read_bytes())
        nullable = {name: fields.pop(name) for name in ("budget", "failed")}
        fields = {name: tuple(item) if isinstance(item, list) else item for name, item in _decoded(fields).items()}
        return Run(**fields, **nullable)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} holds no stored run ({error!r}): delete it to make the run anew") from error
