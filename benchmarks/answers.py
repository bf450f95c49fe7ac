"""Measure answers from pictures or clips on disk to decoded text, unpruned and pruned, on random weights of real size.

All inputs differ. They are prepared as the lmms-eval models and the video script do it. Random weights have no
tokeniser: one of made-up words tokenises the prompts and decodes the answers, which takes it microseconds.
"""

import argparse
import json
import math
import statistics
import time
import warnings
from collections.abc import Iterable, Mapping, Sequence
from contextlib import closing
from copy import copy
from itertools import chain
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import torch
from torch import nn
from tqdm import tqdm
from transformers import BatchFeature

from benchmarks.command_line import common_parser, dtype_of, facts, numbers, ways_of
from benchmarks.families import Preparation
from benchmarks.measure import attached, layer_lengths, warm_up
from benchmarks.models import Case, build, preparation
from benchmarks.report import answers_table, graph_decisions
from benchmarks.roofline import DecoderLayers, decode_floor, measure_roofline, prefill_floor, vision_floor
from benchmarks.speed import PartialResults
from strategy.backbone import find_backbone
from strategy.evaluation.ahead import DEFAULT_WORKERS
from strategy.evaluation.files import write_whole

PROMPTS, BATCHES = 64, 4  # that a row answers at least


class AnswerRow(NamedTuple):
    """What one way to answer takes.

    Attributes:
        name: The way, with its engine.
        batch: How many prompts are answered at once.
        stages: Visual tokens that each stage kept.
        ahead: Answers a second with threads that prepare the next batches.
        one_thread: Answers a second where one thread prepares and answers.
        prepared: Answers a second of prompts that were prepared before.
        first: Median ms from a file on disk to the first token, at batch 1; else nan.
        first_99: That of 99 % of the files, at most.
        host: Ms an answer of preparing, in the run of one thread.
        vision, prefill, decode: Ms an answer on the device, in the run of prompts that were prepared before.
        other: The rest of that run's ms an answer, such as copies to the device and the text.
        vision_multiply_adds: Of one prompt.
        lengths: The length of the sequence in each layer.
        answers: The texts, by threads that prepare the next batches.
        differing: How many answers differ in one of the other two runs.
        graph_report: What the graph engine decided, and why, see `RunRecord.graph_report`.
    """

    name: str
    batch: int
    stages: list[int]
    ahead: float
    one_thread: float
    prepared: float
    first: float
    first_99: float
    host: float
    vision: float
    prefill: float
    decode: float
    other: float
    vision_multiply_adds: float
    lengths: list[int]
    answers: list[str]
    differing: int
    graph_report: str


class Bench(NamedTuple):
    """What all rows of a run share.

    Attributes:
        case: The model and a prompt.
        preparation: How prompts come from files.
        new: Tokens of an answer.
        workers: Threads that prepare.
    """

    case: Case
    preparation: Preparation
    new: int
    workers: int

    def generate(self, inputs: Mapping[str, Any], new: int) -> list[str]:
        """Return the texts of answers of so many tokens, given prepared inputs on the CPU."""
        model = self.case.model
        moved = _to(inputs, model.device)
        tokens = model.generate(**moved, do_sample=False, max_new_tokens=new)[:, -new:]
        texts: list[str] = self.preparation.tokenizer.batch_decode(tokens.tolist(), skip_special_tokens=True)
        return texts

    def answer_all(self, prepared: Iterable[Mapping[str, Any]]) -> tuple[list[str], float]:
        """Answer prepared batches, and return the texts and the seconds, those of preparing included."""
        since = time.perf_counter()
        texts = [*chain.from_iterable(self.generate(inputs, self.new) for inputs in prepared)]
        return texts, time.perf_counter() - since

    def first_token_ms(self, file: Path) -> float:
        """Return the ms from a file to the first token of its answer."""
        since = time.perf_counter()
        self.generate(self.preparation.prepare([file]), 1)
        return 1000 * (time.perf_counter() - since)


def _to(value: Any, device: torch.device) -> Any:
    if isinstance(value, BatchFeature):
        return copy(value).to(device)  # since a batch of transformers moves in place
    if isinstance(value, dict):
        return {name: _to(each, device) for name, each in value.items()}
    return [_to(each, device) for each in value] if isinstance(value, list) else value.to(device, non_blocking=True)


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = common_parser(__doc__, new=16, output="results/answers")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu: a small size")
    parser.add_argument("--batches", default="1", help="batch sizes, such as 1,32,64")
    parser.add_argument(
        "--prompts", type=int, help=f"answers of a row; if not given, {BATCHES} batches and at least {PROMPTS}"
    )
    parser.add_argument("--workers", type=int, default=DEFAULT_WORKERS, help="threads that prepare the next batches")
    given = parser.parse_args(arguments)
    try:
        given.ways, given.batches = ways_of(given), numbers(given.batches, int)
    except ValueError as error:
        parser.error(str(error))
    for name, value, least in (
        ("batches", min(given.batches, default=0), 1),
        ("prompts", given.prompts or PROMPTS, 2),
        ("new", given.new, 2),
        ("workers", given.workers, 1),
    ):
        if value < least:
            parser.error(f"--{name} {value}: want at least {least}")
    return given


def prompts_of(arguments: argparse.Namespace, batch: int) -> int:
    """Return how many prompts a row answers: whole batches, so that no shape is new at the end."""
    wanted = arguments.prompts or max(PROMPTS, BATCHES * batch)
    return batch * math.ceil(wanted / batch)


def vision_parts(case: Case) -> list[nn.Module]:
    """Return the modules that make the visual tokens of a case's prompt, which is answered to see."""
    ran: list[nn.Module] = []
    handles = [
        part.register_forward_pre_hook(lambda module, _: ran.append(module))
        for part in find_backbone(case.model).vision(case.model)
    ]
    try:
        case.model.generate(**case.inputs, do_sample=False, max_new_tokens=1)
    finally:
        for handle in handles:
            handle.remove()
    return [*dict.fromkeys(ran)]


def measure_row(name: str, bench: Bench, files: Sequence[Path], batch: int, **options: Any) -> AnswerRow:
    """Measure one way to answer.

    Args:
        name: Names the row.
        bench: What all rows share.
        files: One for each prompt, whole batches.
        batch: How many prompts are answered at once.
        **options: Those of `strategy.VTRConfig`.
    """
    batches = [files[start : start + batch] for start in range(0, len(files), batch)]
    prepare, kept = bench.preparation.prepare, []
    host = 0.0

    def timed(own: Sequence[Path]) -> Mapping[str, Any]:
        nonlocal host
        since = time.perf_counter()
        kept.append(prepare(own))
        host += time.perf_counter() - since
        return kept[-1]

    with attached(bench.case, **options) as record:
        first_batch = prepare(batches[0])
        warm_up(bench.case.model, lambda new: bench.generate(first_batch, new), bench.new)
        with closing(bench.preparation.ahead(batches, bench.workers)) as prepared:
            texts, ahead = bench.answer_all(prepared)
        alone, one_thread = bench.answer_all(map(timed, batches))
        before = record.clock.seconds()
        again, of_prepared = bench.answer_all(kept)
        spent = record.clock.seconds()
        firsts = [*map(bench.first_token_ms, files)] if batch == 1 else [math.nan] * 2
        means, count = record.means(), len(files)
        parts = {part: 1000 * (spent[part] - before[part]) / count for part in ("vision", "prefill", "decode")}
        return AnswerRow(
            name=name,
            batch=batch,
            stages=[round(tokens) for tokens in means["kept_tokens"]],
            ahead=count / ahead,
            one_thread=count / one_thread,
            prepared=count / of_prepared,
            first=statistics.median(firsts),
            first_99=statistics.quantiles(firsts, n=100, method="inclusive")[98],
            host=1000 * host / count,
            **parts,
            other=1000 * of_prepared / count - sum(parts.values()),
            vision_multiply_adds=means["multiply_adds"]["vision"],
            lengths=layer_lengths(bench.case, means),
            answers=texts,
            differing=sum(len({*each}) > 1 for each in zip(texts, alone, again, strict=True)),
            graph_report=record.graph_report(),
        )


def measure(arguments: argparse.Namespace, results: PartialResults) -> dict[str, Any]:
    """Return everything that a run measures, ready for JSON; rows among the partial results are reused."""
    device = torch.device(arguments.device)
    dtype = dtype_of(arguments, device)
    case = build(arguments.backbone, arguments.device, dtype, small=device.type == "cpu")
    bench = Bench(case, preparation(arguments.backbone, case), arguments.new, arguments.workers)
    roofline, vision, layers = measure_roofline(device, dtype), vision_parts(case), DecoderLayers.of(case.model)
    kinds = [("unpruned", "eager"), *((way, "graph") for way in arguments.ways)]
    keys = [(way, engine, batch) for batch in arguments.batches for way, engine in kinds]
    most = max(prompts_of(arguments, batch) for batch in arguments.batches)
    with TemporaryDirectory() as folder:
        files = [Path(folder) / f"{number}{bench.preparation.suffix}" for number in range(most)]
        for number, file in enumerate(tqdm(files, desc="Writing", unit="file")):
            bench.preparation.write(file, number)

        def row(way: str, engine: str, batch: int) -> AnswerRow:
            own = files[: prompts_of(arguments, batch)]
            return measure_row(f"{way} {engine}", bench, own, batch, engine=engine, **arguments.ways[way])

        with tqdm(total=0, desc="Measuring", unit="way") as bar:
            results.complete(keys, row, bar)

    def floor(row: AnswerRow) -> float:
        batch = row.batch
        least = vision_floor(vision, row.vision_multiply_adds, batch, roofline)
        least += prefill_floor(layers, row.lengths, batch, roofline)
        return (least + (arguments.new - 1) * decode_floor(case.model, roofline)) / batch

    rows = [results.rows[key] for key in keys if key in results.rows]
    return {
        "about": facts(arguments, case, device, dtype, results.made_by["command"]) | {"ceilings": roofline.in_words()},
        "rows": [row._asdict() | {"floor": floor(row)} for row in rows],
    }


def main(arguments: list[str] | None = None) -> None:
    """Measure, print the table and the decisions of the graph engine, and write the table and the JSON."""
    given = parse(arguments)
    results = PartialResults.of(given, "benchmarks.answers", arguments, AnswerRow)
    found = measure(given, results)
    table, file = answers_table(found), results.file.with_suffix("")
    write_whole(Path(f"{file}.json"), json.dumps(found, indent=1).encode())
    write_whole(Path(f"{file}.md"), table.encode())
    results.file.unlink(missing_ok=True)
    print(table)
    print(graph_decisions(found["rows"]))
    for row in found["rows"]:
        if row["differing"]:
            print(f"{row['name']}, batch {row['batch']}: {row['differing']} answers differ between the three runs")
    print(f"written: {file}.json and .md")


if __name__ == "__main__":
    warnings.simplefilter("default")
    main()
