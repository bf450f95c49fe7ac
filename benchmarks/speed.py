"""Measure how fast a backbone answers, unpruned and pruned, eager and graphed, on random weights of real size."""

import argparse
import json
import math
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from benchmarks.command_line import commit, common_parser, dtype_of, facts, numbers, ways_of
from benchmarks.measure import Row, first_difference, free_method_prefill, measure_row
from benchmarks.models import Case, build
from benchmarks.report import graph_decisions, made_with, picture, tables
from benchmarks.roofline import DecoderLayers, decode_floor, measure_roofline, prefill_floor
from strategy.evaluation.files import write_whole

ENGINES = ("eager", "graph")
RowKey = tuple[str, str, int]
"""The way to answer, the engine and the batch of a row."""


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = common_parser(__doc__, new=64, output="results/speed")
    parser.add_argument("--repeats", type=int, default=15, help="times that each is measured")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu: a small size")
    parser.add_argument("--batches", default="1", help="batch sizes, such as 1,2,4,8,16,32,64, for the first budget")
    given = parser.parse_args(arguments)
    try:
        given.ways = ways_of(given)
    except ValueError as error:
        parser.error(str(error))
    return given


def stem_of(arguments: argparse.Namespace) -> str:
    """Return the name of a run's files, without suffix."""
    return f"{arguments.backbone}_{arguments.strategy}_{arguments.budget.replace(',', '_')}"


class PartialResults:
    """The rows that a run has measured so far, in a file, from which the same command on the same commit resumes.

    Args:
        file: The file.
        command: The command.
        kind: The type of a row, a named tuple.
    """

    def __init__(self, file: Path, command: str, kind: Any) -> None:
        self.file, self.made_by = file, {"command": command, "commit": commit()}
        self.rows: dict[RowKey, Any] = {}
        found = json.loads(file.read_text()) if file.is_file() else {}
        if found.get("made_by") == self.made_by:
            self.rows = {(name, engine, batch): kind(**values) for name, engine, batch, values in found["rows"]}

    @classmethod
    def of(cls, given: argparse.Namespace, module: str, words: list[str] | None, kind: Any) -> "PartialResults":
        """Return those of a run in its output folder.

        Args:
            given: The parsed command line.
            module: The benchmark.
            words: The command line as `main` was given it; None for that of the process.
            kind: The type of a row.
        """
        command = f"python -m {module} " + " ".join(sys.argv[1:] if words is None else words)
        return cls(Path(given.output) / f"{stem_of(given)}.part", command, kind)

    def add(self, key: RowKey, row: Any) -> None:
        """Add a row, and write the file."""
        self.rows[key] = row
        content = {"made_by": self.made_by, "rows": [[*key, each._asdict()] for key, each in self.rows.items()]}
        write_whole(self.file, json.dumps(content).encode())

    def complete(self, keys: Sequence[RowKey], measure: Callable[[str, str, int], Any], bar: Any) -> None:
        """Measure the rows that are missing; one that does not fit into memory is left out, with a message.

        Args:
            keys: What rows are wanted.
            measure: Returns a row, given its key.
            bar: The progress bar, which moves on by one a row.
        """
        bar.total += len(keys)
        for way, engine, batch in keys:
            bar.set_postfix_str(f"{way} {engine}, batch {batch}")
            if (way, engine, batch) not in self.rows:
                try:
                    self.add((way, engine, batch), measure(way, engine, batch))
                except torch.cuda.OutOfMemoryError:
                    print(f"{way} {engine}: batch {batch} does not fit into memory", file=sys.stderr)
                    torch.cuda.empty_cache()
            bar.update()


def measure_rows(arguments: argparse.Namespace, case: Case, results: PartialResults, bar: Any) -> None:
    """Measure every way to answer with both engines, and the first two in batches, as far as rows are missing."""
    ways = arguments.ways

    def measure(way: str, engine: str, batch: int) -> Row:
        options = {"engine": engine, **ways[way]}
        return measure_row(f"{way} {engine}", case, batch, max(3, arguments.repeats // batch), arguments.new, **options)

    keys = [(way, engine, 1) for way in ways for engine in ENGINES]
    keys += [(way, "graph", batch) for batch in numbers(arguments.batches, int) if batch > 1 for way in [*ways][:2]]
    results.complete(keys, measure, bar)


def measure(arguments: argparse.Namespace, results: PartialResults) -> dict[str, Any]:
    """Return everything that a run measures, ready for JSON; rows among the partial results are reused."""
    device = torch.device(arguments.device)
    dtype = dtype_of(arguments, device)
    case = build(arguments.backbone, arguments.device, dtype, small=device.type == "cpu")
    layers, ways = DecoderLayers.of(case.model), arguments.ways
    budgets = [None, *dict.fromkeys(numbers(arguments.budget, float))]
    with tqdm(total=len(budgets), desc="Measuring", unit="way") as bar:
        roofline = measure_roofline(device, dtype)
        bar.update()
        measure_rows(arguments, case, results, bar)
        free: dict[str, float] = {}
        for way in [*ways][1:]:
            free[way] = free_method_prefill(case, results.rows[way, "graph", 1].lengths, 1, arguments.repeats)
            bar.update()
    kept_token = sum(layers.cache_bytes())
    found = {}
    for way, budget in zip(ways, budgets, strict=True):
        eager, graph = (results.rows[way, engine, 1] for engine in ENGINES)
        found[way] = {
            "budget": budget,
            "eager": _prefill(eager),
            "graph": _prefill(graph),
            "free": free.get(way),
            "floor": prefill_floor(layers, graph.lengths, 1, roofline),
            "operations": sum(layers.multiply_adds(graph.lengths)),
            "visual_tokens": sum(graph.lengths) / len(layers.modules) - (case.tokens - case.visual),
            "kept_bytes": kept_token * graph.lengths[-1],
            "first_difference": first_difference(case, graph.tokens[0], eager.tokens[0], **ways[way]),
        }
    return {
        "about": facts(arguments, case, device, dtype, results.made_by["command"])
        | {
            "ceilings": roofline.in_words(),
            "decode_floor": decode_floor(case.model, roofline),
        },
        "rows": [each._asdict() for each in results.rows.values()],
        "ways": found,
    }


def main(arguments: list[str] | None = None) -> None:
    """Measure, print the tables and the decisions of the graph engine, and write the JSON and the plot."""
    given = parse(arguments)
    results = PartialResults.of(given, "benchmarks.speed", arguments, Row)
    found = measure(given, results)
    file = results.file.with_suffix("")
    write_whole(Path(f"{file}.json"), json.dumps(found, indent=1).encode())
    results.file.unlink(missing_ok=True)
    picture(found, Path(f"{file}.png"))
    print(tables(found))
    print(graph_decisions(found["rows"]))
    print(made_with(found["about"]))
    for name, way in found["ways"].items():
        print(f"{name}: where the answers of the engines differ first: {way['first_difference']}")
    print(f"written: {file}.json and .png")


def _prefill(row: Row) -> float:
    return row.prefill if math.isnan(row.graph) else row.graph


if __name__ == "__main__":
    warnings.simplefilter("default")
    main()
