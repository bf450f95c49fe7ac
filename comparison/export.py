"""Runs in the layouts of two benchmarks of visual token compression.

VTC-Bench (arXiv 2510.07143) reads `Model/Method/ratio/task.jsonl`, samples as lmms-eval logs them; the unpruned model
is its method Downsample at 1, and what other ratios of this method are called is in LEVELS. A tidy table, one line for
a method, a ratio and a task, is what a table such as that of UniPruneBench (arXiv 2511.02650) is made from.
"""

import io
import math
from collections.abc import Iterable, Sequence
from csv import DictWriter
from pathlib import Path, PurePath
from typing import Any

from comparison.columns import compared
from comparison.runs import DOWNSAMPLE, Run
from strategy.evaluation.files import write_whole

METHOD = "Downsample"
# By how much each side of the picture is divided, by the ratio of tokens that is left.
LEVELS = {"0.25": "2", "0.1111": "3", "0.0625": "4", "0.04": "5", "0.01": "10"}


def export(folder: Path, pretrained: str, runs_by_task: Iterable[Sequence[Run]]) -> Path:
    """Write the samples and the table of a model; return the model's folder.

    Args:
        folder: Where the folders of models lie.
        pretrained: Folder or hub id of the weights; its last part is the model's name.
        runs_by_task: The runs of each task.

    Raises:
        ValueError: A run was stored without samples; nothing was written then.
    """
    model = PurePath(pretrained).name
    rows: list[dict[str, Any]] = []
    files: dict[Path, str] = {}
    for runs in runs_by_task:
        for row in compared(runs):
            run = row.run
            if run.failed is not None:
                continue
            if not run.samples:
                raise ValueError(f"the stored run {run.name} of {run.task} has no samples: delete it to make it anew")
            method, level = place_of(run)
            file = folder / model / method / level / f"{PurePath(run.task).name}.jsonl"
            files[file] = "".join(f"{line}\n" for line in run.samples)
            rows.append(
                {
                    "model": model,
                    "method": run.strategy,
                    "ratio_kept": run.ratio,
                    "percent_pruned": 100 * (1 - run.ratio),
                    "budget": run.budget,
                    "task": PurePath(run.task).name,
                    "metric": run.metric,
                    "value": run.accuracy,
                    "unpruned": row.unpruned.accuracy if row.unpruned else math.nan,
                    "percent_of_unpruned": row.percent_of_unpruned,
                    "questions": len(run.answers),
                    "seeds": len(run.draws) or 1,
                }
            )
    for file, text in files.items():
        write_whole(file, text.encode())
    write_whole(folder / model / "results.csv", _csv(rows).encode())
    return folder / model


def place_of(run: Run) -> tuple[str, str]:
    """Return the method and the ratio of a run as VTC-Bench's folders are called."""
    if run.budget is None:
        return METHOD, "1"
    ratio = f"{run.ratio:.4f}".rstrip("0").rstrip(".")
    return (METHOD, LEVELS.get(ratio, ratio)) if run.strategy == DOWNSAMPLE else (run.strategy, ratio)


def _csv(rows: Sequence[dict[str, Any]]) -> str:
    text = io.StringIO()
    writer = DictWriter(text, list(rows[0]) if rows else [], lineterminator="\n")
    writer.writeheader()
    for row in rows:
        missing = {name: "" for name, value in row.items() if isinstance(value, float) and math.isnan(value)}
        writer.writerow(row | missing)
    return text.getvalue()
