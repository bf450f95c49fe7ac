"""One evaluated run, and how it is stored."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from strategy.evaluation.files import write_whole
from strategy.metrics.record import PARTS

UNPRUNED = "unpruned"


@dataclass(frozen=True)
class Run:
    """One strategy at one budget on one task.

    budget: None if unpruned. metric: the name of the accuracy. scores: one a question, empty if the metric is no
    mean over questions. answers, targets: one a question. record: means over questions; tokens, bytes,
    multiply-adds and seconds. seconds: wall time a question. failed: why the run could not be made; then accuracy
    and seconds are nan and the rest is empty.
    """

    strategy: str
    budget: int | None
    task: str
    metric: str
    accuracy: float
    scores: tuple[float, ...]
    answers: tuple[str, ...]
    targets: tuple[str, ...]
    record: dict[str, Any]
    seconds: float
    failed: str | None = None

    @property
    def name(self) -> str:
        """Strategy and budget."""
        return self.strategy if self.budget is None else f"{self.strategy} {self.budget}"

    @property
    def operations(self) -> float:
        """Multiply-adds of a question's prefill, all parts together; nan if the run failed."""
        return math.nan if self.failed is not None else float(sum(self.record["multiply_adds"][part] for part in PARTS))


def named(knobs: Mapping[str, Any], **fields: Any) -> Run:
    """A run with the strategy and budget of its pruning knobs."""
    pruned = knobs.get("enabled", True)
    return Run(knobs["strategy"] if pruned else UNPRUNED, knobs["keep_tokens"] if pruned else None, **fields)


def ordered(runs: Sequence[Run]) -> list[Run]:
    """The unpruned run first, the rest as given; ValueError if they do not share a task and its questions."""
    made = [run for run in runs if run.failed is None]
    for run in made:
        if (run.task, run.metric, run.targets) != (made[0].task, made[0].metric, made[0].targets):
            raise ValueError(f"{run.name} and {made[0].name} were not run on the same questions of the same task")
    return sorted(runs, key=lambda run: run.strategy != UNPRUNED)


def _encoded(value: Any) -> Any:
    """The value with null for each nan, which JSON does not know."""
    if isinstance(value, dict):
        return {key: _encoded(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_encoded(item) for item in value]
    return None if isinstance(value, float) and math.isnan(value) else value


def _decoded(value: Any) -> Any:
    """The value with nan for each null."""
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
    """A stored run; ValueError if the file holds none."""
    try:
        fields: dict[str, Any] = json.loads(path.read_bytes())
        nullable = {name: fields.pop(name) for name in ("budget", "failed")}
        fields = {name: tuple(item) if isinstance(item, list) else item for name, item in _decoded(fields).items()}
        return Run(**fields, **nullable)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} holds no stored run ({error!r}): delete it to make the run anew") from error
