"""Evaluate strategies at several budgets on a task, and write a table, a CSV and a report.

Finished runs are stored and reused: repeat the command to resume after an interruption. The unpruned model is always
among the runs.
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
from comparison.calibration import MEASURES, QUESTIONS, REFERENCE, calibrated
from comparison.cli import (
    UNPRUNED_OPTIONS,
    Evaluator,
    OptionValues,
    add_options,
    check_used,
    config_of,
    downsample_options,
    load_evaluator,
    model_parser,
    pruned_options,
    take_options,
    unpruned_options,
)
from comparison.export import export
from comparison.listing import ListStrategies
from comparison.pictures import draw
from comparison.published import published_figures
from comparison.report import Example, write
from comparison.runs import (
    DOWNSAMPLE,
    UNPRUNED,
    Run,
    load,
    pooled,
    run_name,
    run_of,
    save,
    strategy_and_budget,
)
from comparison.tables import csv, markdown
from strategy.config import describe_options, strategy_options
from strategy.evaluation import digest
from strategy.evaluation.files import write_whole

SET_OTHERWISE = ("enabled", "strategy", "keep_tokens", "retain_ratio", "seed")
HOW = "since --strategies, --budgets and --seeds set it"
ALL = "all"
FEW = 80  # questions that all strategies are asked if no number is given, so that two cores take a quarter of an hour


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = model_parser(__doc__)
    parser.add_argument("--strategies", required=True, help=f"some of {','.join(strategy_names())}; or {ALL}")
    parser.add_argument("--budgets", required=True, help="numbers of tokens, such as 192,128,64")
    parser.add_argument("--tasks", required=True, help="tasks of lmms-eval; for videollava folders, see its README")
    parser.add_argument(
        "--limit",
        type=int,
        help=f"only the first so many questions; if not given, {FEW} with --strategies {ALL}, else all",
    )
    parser.add_argument("--seeds", type=int, default=3, help="how often random tokens are drawn")
    parser.add_argument(
        "--calibrate",
        choices=tuple(MEASURES),
        help=f"change each budget until the strategy measures as {REFERENCE} does at it: tokens of the mean layer, or "
        "operations of the prefill, scoring included",
    )
    parser.add_argument(
        "--examples", type=int, default=1, help="pictures a strategy of what it got right, and of wrong"
    )
    parser.add_argument("--output", type=Path, default=Path("results/compare"), help="folder for runs and reports")
    parser.add_argument(
        "--export", type=Path, help="folder for samples as VTC-Bench reads them, and a tidy table; none if not given"
    )
    parser.add_argument(
        "--list", nargs=0, action=ListStrategies, default=False, help="print all strategies and what they need, and end"
    )
    add_options(parser, SET_OTHERWISE)
    given = parser.parse_args(arguments)
    if given.limit is None and given.strategies == ALL:
        given.limit = FEW
    return given


def options_of_runs(arguments: argparse.Namespace) -> list[OptionValues]:
    """Return the options of each run that a command line asks for, the unpruned run first.

    An option that only some of the strategies use is in their runs only.

    Raises:
        ValueError: An argument is not allowed, or none of the strategies uses an option.
    """
    if not all(budget.isdecimal() for budget in arguments.budgets.split(",")):
        raise ValueError(f"--budgets {arguments.budgets}: want whole numbers of tokens, such as 192,128,64")
    if arguments.limit is not None and arguments.limit < 1:
        raise ValueError(f"--limit {arguments.limit}: want a number of questions from 1 up")
    if arguments.seeds < 1:
        raise ValueError(f"--seeds {arguments.seeds}: want a number of draws from 1 up")
    if arguments.examples < 0:
        raise ValueError(f"--examples {arguments.examples}: want a number of pictures from 0 up")
    given = take_options(arguments, SET_OTHERWISE, HOW)
    budgets = [int(budget) for budget in dict.fromkeys(arguments.budgets.split(","))]
    named = strategy_names() if arguments.strategies == ALL else arguments.strategies.split(",")
    strategies = list(dict.fromkeys(named))
    runs = [
        downsample_options(given, budget)
        if name == DOWNSAMPLE
        else pruned_options(name, given, keep_tokens=budget, **draw)
        for name in strategies
        for budget in budgets
        for draw in draws_of(name, arguments.seeds)
    ]
    check_used(given, strategies)
    return [unpruned_options(given), *runs]


def strategy_names() -> tuple[str, ...]:
    """Return what `--strategies` takes."""
    return (*strategy.available(), DOWNSAMPLE)


def weights_of(options: Sequence[OptionValues]) -> list[str]:
    """Return the hub ids or folders of weights that the options of runs name."""
    return list(dict.fromkeys(weights for own in options for weights in config_of(own).weight_sources))


def draws_of(name: str, seeds: int) -> list[dict[str, int]]:
    """Return the options of each draw of a strategy: one for each seed if it has seeds, otherwise none."""
    return [{"seed": seed} for seed in range(seeds)] if name in strategy_options()["seed"] else [{}]


def path_of(folder: Path, settings: Mapping[str, Any], options: OptionValues) -> Path:
    """Return where a run is stored: under a name that changes with its options and settings.

    Args:
        folder: The folder of a task.
        settings: What runs of the same options differ by, with the digests of code, weights and tasks.
        options: The options of the run. An option with its default value is the same as none.
    """
    defaults = {name: str(default) for name, (default, _) in describe_options().items()}
    differing = {name: value for name, value in options.items() if str(value) != defaults.get(name)}
    text = json.dumps([settings, differing], sort_keys=True)
    name = run_name(*strategy_and_budget(options)).replace(" ", "-")
    return folder / "runs" / f"{name}-{hashlib.sha256(text.encode()).hexdigest()[:10]}.json"


def run_or_load(evaluator: Evaluator, task: str, options: OptionValues, limit: int | None, file: Path) -> Run:
    """Return the stored run, or a new one, which is stored.

    A run that the strategy refuses is returned with its reason, and not stored; the unpruned run raises that reason.
    """
    if file.exists():
        return load(file)
    try:
        run = evaluator.run(task, options, limit)
    except (SystemExit, ValueError) as error:
        if strategy_and_budget(options)[0] == UNPRUNED:
            raise
        return failed_run(options, task, str(error))
    save(run, file)
    return run


def failed_run(options: OptionValues, task: str, reason: str) -> Run:
    """Return a run that could not be made."""
    nothing: dict[str, Any] = {"metric": "", "scores": (), "answers": (), "targets": (), "record": {}}
    return run_of(options, task=task, accuracy=math.nan, seconds=math.nan, failed=reason, **nothing)


def choose_examples(runs: Sequence[Run], count: int) -> list[tuple[Run, int]]:
    """Return runs and the numbers of questions to show of them.

    For each strategy, at its smallest budget, these are up to `count` questions that pruning got right, and as many
    that it got wrong, of those that the unpruned model got right. No question is taken twice while there are others.
    """
    unpruned, found, taken = runs[0], [], set()
    for name in dict.fromkeys(run.strategy for run in runs[1:]):
        scored = [run for run in runs if run.strategy == name and run.scores]
        if not scored or not unpruned.scores:
            continue
        run = min(scored, key=lambda run: run.budget or 0)
        for right in (1.0, 0.0):
            fit = [at for at, score in enumerate(run.scores) if score == right and unpruned.scores[at] == 1]
            for number in sorted(fit, key=lambda at: (at in taken, at))[:count]:
                taken.add(number)
                found.append((run, number))
    return found


def draw_examples(
    evaluator: Evaluator,
    task: str,
    chosen: Sequence[tuple[Run, int]],
    options: Sequence[OptionValues],
    limit: int | None,
) -> list[Example]:
    """Answer the chosen questions again, and draw them.

    Args:
        evaluator: Answers.
        task: The task.
        chosen: Runs and numbers of questions.
        options: The options of all runs, the unpruned run first.
        limit: As for the runs.
    """
    numbers = sorted({number for _, number in chosen})
    if not numbers:
        return []
    # Of several draws the first is shown, whose answers the run has.
    by_name = {run_name(*strategy_and_budget(each)): each for each in reversed(options)}
    unpruned = dict(zip(numbers, evaluator.inspect_many(task, numbers, options[0], limit), strict=True))
    drawn = []
    for name in tqdm(list(dict.fromkeys(run.name for run, _ in chosen)), desc="Drawing", unit="run"):
        own = [(run, number) for run, number in chosen if run.name == name]
        inspections = evaluator.inspect_many(task, [number for _, number in own], by_name[name], limit)
        for (run, number), pruned in zip(own, inspections, strict=True):
            right = run.scores[number] == 1
            texts = pruned.question, pruned.target, unpruned[number].answer, pruned.answer
            drawn.append(Example(*texts, run.strategy, run.budget or 0, right, draw(pruned)))
    return drawn


def facts(arguments: argparse.Namespace, given: OptionValues, task: str, run: Run) -> dict[str, str]:
    """Return facts about the runs, for the report."""
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    versions = [f"{name} {importlib.metadata.version(name)}" for name in ("torch", "transformers")]
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"{platform.machine()} CPU"
    others, kind = {name: value for name, value in given.items() if name != "budget_basis"}, arguments.calibrate
    return {
        "model": arguments.model,
        "checkpoint": arguments.pretrained,
        "task": f"{task}, {len(run.answers)} questions",
        "budgets count": given.get("budget_basis", describe_options()["budget_basis"][0]),
        **({"calibrated": f"{kind}, as {REFERENCE} measures on {QUESTIONS} questions"} if kind else {}),
        **({"options": ", ".join(f"{name}={value}" for name, value in others.items())} if others else {}),
        "report written at commit": commit.stdout.strip() or "not in a repository",
        "versions": ", ".join(versions),
        "device": f"{device}, {torch.get_num_threads()} threads",
        "date": date.today().isoformat(),
    }


def compare(
    evaluator: Evaluator, arguments: argparse.Namespace, options: Sequence[OptionValues], task: str
) -> list[Run]:
    """Run or load the runs of one task, and write the table, the CSV and the report; return the runs."""
    folder = arguments.output / arguments.model / Path(task).name
    settings = {name: getattr(arguments, name) for name in ("pretrained", "model_args", "limit")}
    settings |= {
        "task": task,
        "code": digest.of_code(("strategy", evaluator.package)),
        "versions": digest.of_versions(),
        "weights": digest.of_weights([arguments.pretrained, *weights_of(options)]),
        "tasks": digest.of_tasks([arguments.include_path, task]),
    }
    runs: list[Run] = []
    made: list[OptionValues] = []

    def run_few(trial: OptionValues) -> Run:
        few = path_of(folder / "calibration", settings | {"limit": QUESTIONS}, trial)
        return run_or_load(evaluator, task, trial, QUESTIONS, few)

    for number, asked in enumerate(options, start=1):
        own = asked
        if arguments.calibrate:
            try:
                own = calibrated(asked, arguments.calibrate, runs[0].nominal_tokens if runs else 0, run_few)
            except ValueError as error:
                runs.append(failed_run(asked, task, f"--calibrate {arguments.calibrate}: {error}"))
                continue
        made.append(own)
        file = path_of(folder, settings, own)
        stored = ", as stored" if file.exists() else ""
        print(f"\n{task}, run {number} of {len(options)}: {file.stem}{stored}", flush=True)
        runs.append(run_or_load(evaluator, task, own, arguments.limit, file))
        if runs[-1].graph_report:
            print(f"decisions of the graph engine:\n{runs[-1].graph_report}")
    runs = pooled(runs)
    given = {name: value for own in options for name, value in own.items() if name not in (*SET_OTHERWISE, DOWNSAMPLE)}
    # A paper's figures are those of all questions, with its own options.
    other = arguments.limit or arguments.calibrate or set(given) - set(UNPRUNED_OPTIONS)
    published = {} if other else published_figures(arguments.pretrained, runs)
    chosen = choose_examples(runs, arguments.examples)
    examples = draw_examples(evaluator, task, chosen, made, arguments.limit)
    table = markdown(runs, published)
    write_whole(folder / "table.md", table.encode())
    write_whole(folder / "table.csv", csv(runs, published).encode())
    write(runs, examples, facts(arguments, given, task, runs[0]), folder / "report.html", published)
    print(f"\n{table}\nwritten to {folder}: table.md, table.csv, report.html")
    return runs


def main() -> None:
    """Compare on each task."""
    arguments = parse()
    try:
        arguments.output.mkdir(parents=True, exist_ok=True)
        options = options_of_runs(arguments)
        evaluator = load_evaluator(arguments)
        runs = [compare(evaluator, arguments, options, task) for task in arguments.tasks.split(",")]
        if arguments.export is not None:
            print(f"exported to {export(arguments.export, arguments.pretrained, runs)}")
    except (ValueError, OSError) as error:
        sys.exit(f"compare: {error}")
    except KeyboardInterrupt:
        sys.exit("compare: stopped; the same command goes on, and makes no stored run again")


if __name__ == "__main__":
    main()
