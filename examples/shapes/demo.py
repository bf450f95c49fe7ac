"""Evaluate a small checkpoint through lmms-eval, unpruned and at CLSE's three budgets, and print one table."""

import argparse
import json
import time
from pathlib import Path
from typing import Any

from lmms_eval.evaluator import simple_evaluate
from lmms_eval.models import get_model
from lmms_eval.tasks import TaskManager
from pytablewriter import MarkdownTableWriter

TASKS = Path(__file__).parent / "tasks"
BUDGETS = {"unpruned": "enabled=False"} | {f"clse {n}": f"strategy=clse,keep_tokens={n}" for n in (192, 128, 64)}
COLUMNS = (
    *("run", "accuracy", "% of unpruned", "visual tokens kept", "mean visual tokens per layer"),
    *("KV bytes per question", "seconds per question"),
)


def evaluate(model: str, checkpoint: str, task: str, knobs: str, limit: int | None) -> dict[str, Any]:
    """One run's accuracy, the means of its record, and the seconds a question took."""
    lm = get_model(model).create_from_arg_string(f"pretrained={checkpoint},{knobs}")
    generate, seconds = lm.generate_until, []

    def timed(requests: list[Any]) -> list[str]:
        start = time.perf_counter()
        answers = generate(requests)
        seconds.append((time.perf_counter() - start) / len(requests))
        return answers

    lm.generate_until = timed
    manager = TaskManager(include_path=str(TASKS), model_name=model)
    results = simple_evaluate(model=lm, tasks=[task], task_manager=manager, limit=limit, batch_size=1)
    scores = {key.split(",")[0]: value for key, value in results["results"][task].items() if key.endswith(",none")}
    return {"scores": scores, "seconds": seconds[0]} | lm.record.means()


def row(name: str, run: dict[str, Any], unpruned: dict[str, Any]) -> list[str]:
    """One line of the table."""
    accuracy, reference = run["scores"]["accuracy"], unpruned["scores"]["accuracy"]
    return [
        name,
        f"{accuracy:.3f}",
        f"{100 * accuracy / reference:.1f}" if reference else "-",
        "/".join(f"{kept:g}" for kept in run["kept_tokens"]) or f"{run['visual_tokens']:g}",
        f"{run['tokens_per_layer']:.1f}",
        f"{run['cache_bytes']:,.0f}",
        f"{run['seconds']:.3f}",
    ]


def main() -> None:
    """Run all, print the table, and leave it and the numbers under the output folder."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True, help="name of the model in lmms-eval")
    parser.add_argument("--checkpoint", required=True, help="folder or hub id")
    parser.add_argument("--task", default="shapes", help="shapes, or shapes_varied for pictures of many sizes")
    parser.add_argument("--limit", type=int, help="questions a run; all 400 if not given")
    parser.add_argument("--output", type=Path, default=Path("results"), help="folder for the table and the numbers")
    options = parser.parse_args()
    runs = {}
    for name, knobs in BUDGETS.items():
        print(f"\n{name}: {knobs}", flush=True)
        runs[name] = evaluate(options.model, options.checkpoint, options.task, knobs, options.limit)
    writer = MarkdownTableWriter(
        headers=list(COLUMNS), value_matrix=[row(name, run, runs["unpruned"]) for name, run in runs.items()]
    )
    options.output.mkdir(parents=True, exist_ok=True)
    stem = options.output / f"demo_{options.model}"
    stem.with_suffix(".json").write_text(json.dumps(runs, indent=2) + "\n")
    stem.with_suffix(".md").write_text(writer.dumps())
    print(f"\n{writer.dumps()}\nwritten to {stem}.md and {stem}.json")


if __name__ == "__main__":
    main()
