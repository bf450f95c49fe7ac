"""Evaluate strategies at several budgets on a task, and write a table, a CSV and a report.

Runs that are stored already are not made again: after a stop, the same command goes on. The unpruned model is
always among them.
"""

import argparse
import hashlib
import importlib.metadata
import json
import math
import platform
import subprocess
import sys
from collections.abc import Mapping, Sequence
from datetime import date
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

import strategy
from comparison.command import evaluator, knobs, parser
from comparison.pictures import draw
from comparison.report import Example, write
from comparison.runs import UNPRUNED, Run, load, save
from comparison.tables import csv, markdown
from strategy.evaluation.files import write_whole

OWN = {"enabled", "strategy", "keep_tokens", "retain_ratio", "budget_basis"}  # knobs that the command line sets
START = 1 << 20  # bytes of a file that, with its name and size, tell it from others


def options() -> argparse.Namespace:
    """The command line."""
    made = parser(__doc__)
    made.add_argument("--strategies", required=True, help=f"some of {','.join(strategy.available())}")
    made.add_argument("--budgets", required=True, help="numbers of tokens, such as 192,128,64")
    made.add_argument("--tasks", required=True, help="tasks of lmms-eval; for videollava folders, see its README")
    made.add_argument("--budget_basis", default="stages", help="what a budget counts: stages, mean or flops")
    made.add_argument("--limit", type=int, help="only the first so many questions; all if not given")
    made.add_argument("--examples", type=int, default=1, help="pictures a strategy of what it got right, and of wrong")
    made.add_argument("--output", type=Path, default=Path("results/compare"), help="folder for runs and reports")
    return made.parse_args()


def digest(*folders: str | Path | None) -> str:
    """What tells the files in some folders, and the versions of what runs them, from others."""
    total = hashlib.sha256()
    for folder in map(Path, [folder for folder in folders if folder]):
        for file in sorted(folder.glob("*.*")):
            if file.is_file():
                with file.open("rb") as stream:
                    total.update(f"{file.name} {file.stat().st_size} ".encode() + stream.read(START))
    for name in ("torch", "transformers", "lmms-eval"):
        total.update(importlib.metadata.version(name).encode())
    return total.hexdigest()


def place(folder: Path, settings: Mapping[str, Any], pruning: Mapping[str, Any]) -> Path:
    """Where a run is stored: under a name that changes with its settings, which hold a digest of its files."""
    text = json.dumps([settings, pruning], sort_keys=True)
    name = "-".join(str(value) for value in pruning.values()) if pruning.get("enabled", True) else UNPRUNED
    return folder / "runs" / f"{name}-{hashlib.sha256(text.encode()).hexdigest()[:10]}.json"


def made(asked: Any, task: str, pruning: Mapping[str, Any], limit: int | None, file: Path) -> Run:
    """The stored run, or a new one; one that the strategy cannot make is kept as failed, but not stored."""
    if file.exists():
        return load(file)
    try:
        run = asked.run(task, pruning, limit)
    except (SystemExit, ValueError) as error:
        if not pruning.get("enabled", True):
            raise
        return Run(
            pruning["strategy"], pruning["keep_tokens"], task, "", math.nan, (), (), (), {}, math.nan, str(error)
        )
    save(run, file)
    return run


def chosen(runs: Sequence[Run], count: int) -> list[tuple[Run, int]]:
    """For each strategy, at its smallest budget, so many questions that pruning got right, and as many it got wrong.

    All of them the unpruned model got right; no question twice while there are others.
    """
    unpruned, found, taken = runs[0], [], set()
    for name in dict.fromkeys(run.strategy for run in runs[1:]):
        mine = [run for run in runs if run.strategy == name and run.scores]
        if not mine or not unpruned.scores:
            continue
        run = min(mine, key=lambda run: run.budget or 0)
        for right in (1.0, 0.0):
            fit = [at for at, score in enumerate(run.scores) if score == right and unpruned.scores[at] == 1]
            for number in sorted(fit, key=lambda at: (at in taken, at))[:count]:
                taken.add(number)
                found.append((run, number))
    return found


def examples(
    asked: Any, task: str, picked: Sequence[tuple[Run, int]], pruning: Mapping[str, Any], limit: int | None
) -> list[Example]:
    """Ask the picked questions again, and draw them."""
    numbers = sorted({number for _, number in picked})
    if not numbers:
        return []
    plain = dict(zip(numbers, asked.looks(task, numbers, {"enabled": False}, limit), strict=True))
    drawn = []
    for run in tqdm(list(dict.fromkeys(run.name for run, _ in picked)), desc="Drawing", unit="run"):
        own = [(its, number) for its, number in picked if its.name == run]
        its = own[0][0]
        looks = asked.looks(task, [number for _, number in own], knobs(its.strategy, its.budget, **pruning), limit)
        for (_, number), pruned in zip(own, looks, strict=True):
            right = its.scores[number] == 1
            words = pruned.question, pruned.target, plain[number].answer, pruned.answer
            drawn.append(Example(*words, its.strategy, its.budget or 0, right, draw(pruned)))
    return drawn


def about(given: argparse.Namespace, task: str, run: Run) -> dict[str, str]:
    """Facts on the runs."""
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    versions = [f"{name} {importlib.metadata.version(name)}" for name in ("torch", "transformers")]
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"{platform.machine()} CPU"
    return {
        "model": given.model,
        "checkpoint": given.pretrained,
        "task": f"{task}, {len(run.answers)} questions",
        "budgets count": given.budget_basis,
        "report written at commit": commit.stdout.strip() or "not in a repository",
        "versions": ", ".join(versions),
        "device": f"{device}, {torch.get_num_threads()} threads",
        "date": date.today().isoformat(),
    }


def compare(asked: Any, given: argparse.Namespace, task: str) -> None:
    """Make the runs of one task and write what they show."""
    folder = given.output / given.model / Path(task).name
    basis = {} if given.budget_basis == "stages" else {"budget_basis": given.budget_basis}
    if not all(budget.isdecimal() for budget in given.budgets.split(",")):
        raise ValueError(f"--budgets {given.budgets}: want whole numbers of tokens, such as 192,128,64")
    if given.limit is not None and given.limit < 1:
        raise ValueError(f"--limit {given.limit}: want a number of questions from 1 up")
    if given.examples < 0:
        raise ValueError(f"--examples {given.examples}: want a number of pictures from 0 up")
    named = {part.partition("=")[0].strip().removeprefix("vtr_") for part in given.model_args.split(",")}
    if named & OWN:
        raise ValueError(
            f"--model_args {given.model_args}: {', '.join(sorted(named & OWN))} is what --strategies, --budgets and "
            "--budget_basis say"
        )
    budgets = [int(budget) for budget in dict.fromkeys(given.budgets.split(","))]
    wanted = [knobs("", None)]
    wanted += [
        knobs(name, budget, **basis) for name in dict.fromkeys(given.strategies.split(",")) for budget in budgets
    ]
    settings = {name: getattr(given, name) for name in ("pretrained", "model_args", "limit")}
    code = Path(strategy.__file__).parent
    settings |= {"task": task, "digest": digest(given.pretrained, code, given.include_path, task)}
    runs = []
    for number, pruning in enumerate(wanted, start=1):
        file = place(folder, settings, pruning)
        stored = ", as stored" if file.exists() else ""
        print(f"\n{task}, run {number} of {len(wanted)}: {file.stem}{stored}", flush=True)
        runs.append(made(asked, task, pruning, given.limit, file))
    drawn = examples(asked, task, chosen(runs, given.examples), basis, given.limit)
    table = markdown(runs)
    write_whole(folder / "table.md", table.encode())
    write_whole(folder / "table.csv", csv(runs).encode())
    write(runs, drawn, about(given, task, runs[0]), folder / "report.html")
    print(f"\n{table}\nwritten to {folder}: table.md, table.csv, report.html")


def main() -> None:
    """Compare on each task."""
    given = options()
    try:
        given.output.mkdir(parents=True, exist_ok=True)
        asked = evaluator(given)
        for task in given.tasks.split(","):
            compare(asked, given, task)
    except (ValueError, OSError) as error:
        sys.exit(f"compare: {error}")
    except KeyboardInterrupt:
        sys.exit("compare: stopped; the same command goes on, and makes no stored run again")


if __name__ == "__main__":
    main()
