"""Measure how fast a backbone answers, unpruned and pruned, eager and graphed, on random weights of real size."""

import argparse
import json
import math
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from tqdm import tqdm

import strategy
from benchmarks import ceilings
from benchmarks.measure import Row, first_difference, free, row
from benchmarks.models import BACKBONES, Case, build
from benchmarks.report import made_with, picture, tables

ENGINES = ("eager", "graph")
DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}


def parser_of(about: str | None, new: int, output: str) -> argparse.ArgumentParser:
    """What every measurement can be told; new, output: the defaults of these."""
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--backbone", required=True, choices=BACKBONES)
    parser.add_argument("--budget", default="192", help="keep_tokens, or up to 1 retain_ratio; several, such as 192,64")
    parser.add_argument("--strategy", default="clse", choices=strategy.available())
    parser.add_argument("--dtype", choices=DTYPES, help="float16 on a GPU, else float32")
    parser.add_argument("--new", type=int, default=new, help="tokens decoded an answer")
    parser.add_argument("--repeats", type=int, default=15, help="times that each is measured")
    parser.add_argument("--output", default=output, help="folder for what is written")
    return parser


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = parser_of(__doc__, new=64, output="results/speed")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu: a small size")
    parser.add_argument("--batches", default="1", help="batch sizes, such as 1,2,4,8,16,32,64, for the first budget")
    return parser.parse_args(arguments)


def dtype_of(options: argparse.Namespace, device: torch.device) -> torch.dtype:
    """The type of the weights, as asked or as fits the device."""
    return DTYPES[options.dtype or ("float32" if device.type == "cpu" else "float16")]


def ways_of(options: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """The fields of `strategy.VTRConfig` for each way to answer, the unpruned one first; ValueError for no number."""
    budgets = dict.fromkeys(numbers(options.budget, float))
    pruned = {f"pruned {budget:g}": {"strategy": options.strategy, **knob(budget)} for budget in budgets}
    return {"unpruned": {"enabled": False}, **pruned}


def knob(budget: float) -> dict[str, Any]:
    """A budget as the field of VTRConfig that it is."""
    return {"retain_ratio": budget} if budget <= 1 else {"keep_tokens": int(budget)}


def numbers(text: str, kind: Callable[[str], Any]) -> list[Any]:
    """The numbers of a comma-separated list."""
    return [kind(each) for each in text.split(",") if each]


def commit() -> str:
    """The commit measured, with a plus if it was changed."""
    try:
        found = subprocess.run(["git", "describe", "--always", "--dirty=+"], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return found.stdout.strip()


class Kept:
    """The rows that a run has measured so far, in a file, for the same command on the same commit to go on from."""

    def __init__(self, file: Path, command: str) -> None:
        self.file, self.made_by = file, {"command": command, "commit": commit()}
        self.rows: dict[tuple[str, str, int], Row] = {}
        found = json.loads(file.read_text()) if file.is_file() else {}
        if found.get("made_by") == self.made_by:
            self.rows = {(name, engine, batch): Row(**values) for name, engine, batch, values in found["rows"]}

    def write(self, rows: dict[tuple[str, str, int], Row]) -> None:
        """Keep these rows."""
        self.file.parent.mkdir(parents=True, exist_ok=True)
        whole = {"made_by": self.made_by, "rows": [[*key, each._asdict()] for key, each in rows.items()]}
        beside = self.file.with_suffix(".new")
        beside.write_text(json.dumps(whole))
        beside.replace(self.file)


def measured(options: argparse.Namespace, command: str, kept: Kept) -> dict[str, Any]:
    """Everything that a run measures, ready for JSON; rows that are kept are not measured again."""
    device = torch.device(options.device)
    small = device.type == "cpu"
    dtype = dtype_of(options, device)
    case = build(options.backbone, options.device, dtype, small=small)
    repeats, layers = options.repeats, case.model.get_decoder().layers
    budgets = [*dict.fromkeys(numbers(options.budget, float))]
    ways = ways_of(options)
    jobs = [(way, engine, 1) for way in ways for engine in ENGINES]
    jobs += [(way, "graph", batch) for batch in numbers(options.batches, int) if batch > 1 for way in [*ways][:2]]
    rows: dict[tuple[str, str, int], Row] = dict(kept.rows)
    with tqdm(total=len(jobs) + 1 + len(budgets), desc="Measuring", unit="way") as bar:
        top = ceilings.measure(device, dtype)
        bar.update()
        for way, engine, batch in jobs:
            bar.set_postfix_str(f"{way} {engine}, batch {batch}")
            times = max(3, repeats // batch)
            try:
                if (way, engine, batch) in rows:
                    continue
                rows[way, engine, batch] = row(
                    f"{way} {engine}", case, batch, times, options.new, engine=engine, **ways[way]
                )
                kept.write(rows)
            except torch.cuda.OutOfMemoryError:
                print(f"{way} {engine}: batch {batch} does not fit into memory", file=sys.stderr)
                torch.cuda.empty_cache()
            finally:
                bar.update()
        alone = {}
        for way in [*ways][1:]:
            alone[way] = free(case, rows[way, "graph", 1].lengths, 1, repeats)
            bar.update()
    weight = layers[0].self_attn.k_proj.weight
    told = {}
    for way, budget in zip(ways, (None, *budgets), strict=True):
        eager, graph = (rows[way, engine, 1] for engine in ENGINES)
        told[way] = {
            "budget": budget,
            "eager": _prefill(eager),
            "graph": _prefill(graph),
            "free": alone.get(way),
            "floor": ceilings.floor(layers, graph.lengths, 1, top),
            "operations": _operations(layers, graph.lengths),
            "visual_tokens": sum(graph.lengths) / len(layers) - (case.tokens - case.visual),
            "kept_bytes": 2 * len(layers) * graph.lengths[-1] * weight.shape[0] * weight.element_size(),
            "first_difference": first_difference(case, graph.tokens[0], eager.tokens[0], **ways[way]),
        }
    return {
        "about": about(options, case, device, dtype, command)
        | {
            "ceilings": {"TFLOP/s": top.operations / 1e12, "GB/s": top.bytes / 1e9},
            "decode_floor": ceilings.decode_floor(case.model, top),
        },
        "rows": [each._asdict() for each in rows.values()],
        "ways": told,
    }


def about(
    options: argparse.Namespace, case: Case, device: torch.device, dtype: torch.dtype, command: str
) -> dict[str, Any]:
    """What was measured, on what and with which versions."""
    return {
        "backbone": options.backbone,
        "strategy": options.strategy,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU, a small size",
        "dtype": str(dtype).removeprefix("torch."),
        "visual": case.visual,
        "tokens": case.tokens,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "commit": commit(),
        "command": command,
    }


def main(arguments: list[str] | None = None) -> None:
    """Measure, print the tables, and write the JSON and the plot."""
    options = parse(arguments)
    command = "python -m benchmarks.speed " + " ".join(sys.argv[1:] if arguments is None else arguments)
    folder, stem = Path(options.output), f"{options.backbone}_{options.strategy}_{options.budget.replace(',', '_')}"
    kept = Kept(folder / f"{stem}.part", command)
    found = measured(options, command, kept)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{stem}.json").write_text(json.dumps(found, indent=1))
    kept.file.unlink(missing_ok=True)
    picture(found, folder / f"{stem}.png")
    print(tables(found))
    print(made_with(found["about"]))
    for way, told in found["ways"].items():
        print(f"{way}: where the answers of the engines part: {told['first_difference']}")
    print(f"written: {folder / stem}.json and .png")


def _prefill(row: Row) -> float:
    return row.prefill if math.isnan(row.graph) else row.graph


def _operations(layers: Any, lengths: list[int]) -> float:
    return sum(
        length * (ceilings.token_cost(layer, 0) + ceilings.pair_cost(layer, ceilings.llama_spec(layer)) * length / 2)
        for layer, length in zip(layers, lengths, strict=True)
    )


if __name__ == "__main__":
    warnings.simplefilter("default")
    main()
