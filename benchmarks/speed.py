"""Measure how fast a backbone answers, unpruned and pruned, eager and graphed, on random weights of real size."""

import argparse
import json
import math
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
import transformers
from tqdm import tqdm

import strategy
from benchmarks import ceilings
from benchmarks.measure import Row, first_difference, free, row
from benchmarks.models import BACKBONES, build
from benchmarks.report import picture, tables
from strategy.config import VTRConfig

DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--backbone", required=True, choices=BACKBONES)
    parser.add_argument("--budget", type=float, default=192, help="keep_tokens, or up to 1 retain_ratio")
    parser.add_argument("--strategy", default="clse", choices=strategy.available())
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu: a small size")
    parser.add_argument("--dtype", choices=DTYPES, help="float16 on a GPU, else float32")
    parser.add_argument("--batches", default="1", help="batch sizes, such as 1,2,4,8,16,32,64")
    parser.add_argument("--curve", default="", help="further budgets for the plot, such as 64,128,256,384")
    parser.add_argument("--new", type=int, default=64, help="tokens decoded an answer")
    parser.add_argument("--repeats", type=int, default=15, help="times that a median is taken of")
    parser.add_argument("--output", default="results/speed", help="folder for the JSON and the plot")
    return parser.parse_args(arguments)


def knob(budget: float) -> dict[str, Any]:
    """A budget as the field of VTRConfig that it is."""
    return {"retain_ratio": budget} if budget <= 1 else {"keep_tokens": int(budget)}


def commit() -> str:
    """The commit measured, with a plus if it was changed."""
    try:
        found = subprocess.run(["git", "describe", "--always", "--dirty=+"], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return found.stdout.strip()


def main(arguments: list[str] | None = None) -> None:
    """Measure, print the tables, and write the JSON and the plot."""
    options = parse(arguments)
    device = torch.device(options.device)
    small = device.type == "cpu"
    dtype = DTYPES[options.dtype] if options.dtype else torch.float32 if small else torch.float16
    case = build(options.backbone, options.device, dtype, small=small)
    batches = [int(each) for each in options.batches.split(",")]
    pruned = {"strategy": options.strategy, **knob(options.budget)}
    ways = {"unpruned": {"enabled": False}, "pruned": pruned}
    jobs = [(name, engine, 1, given) for name, given in ways.items() for engine in ("eager", "graph")]
    jobs += [(name, "graph", batch, given) for batch in batches if batch > 1 for name, given in ways.items()]
    curve = [
        (budget, engine)
        for budget in map(float, filter(None, options.curve.split(",")))
        for engine in ("eager", "graph")
    ]
    repeats = options.repeats
    rows: list[Row] = []
    points: dict[float, dict[str, Any]] = {}
    with tqdm(total=len(jobs) + len(curve) + 2, desc="Measuring", unit="way") as bar:
        top = ceilings.measure(device, dtype)
        bar.update()
        for name, engine, batch, given in jobs:
            bar.set_postfix_str(f"{name} {engine}, batch {batch}")
            try:
                rows.append(
                    row(f"{name} {engine}", case, batch, max(3, repeats // batch), options.new, engine=engine, **given)
                )
            except torch.cuda.OutOfMemoryError:
                print(f"{name} {engine}: batch {batch} does not fit into memory", file=sys.stderr)
                torch.cuda.empty_cache()
            bar.update()
        for budget, engine in curve:
            bar.set_postfix_str(f"budget {budget:g} {engine}")
            known = {"strategy": options.strategy, **knob(budget)}
            point = row("", case, 1, max(3, repeats // 3), 2, engine=engine, **known)
            points.setdefault(budget, {"lengths": point.lengths})[engine] = _prefill(point)
            bar.update()
        base, ours = (next(each for each in rows if each.name == f"{name} graph") for name in ways)
        alone = free(case, ours.lengths, 1, repeats)
        bar.update()

    def apart(name: str, given: dict[str, Any]) -> dict[str, float] | None:
        theirs, ours = (next(each for each in rows if each.name == f"{name} {way}") for way in ("eager", "graph"))
        return first_difference(case, ours.tokens[0], theirs.tokens[0], **given)

    layers = case.model.get_decoder().layers
    text = case.tokens - case.visual
    for way, (name, each) in enumerate(zip(ways, (base, ours), strict=True)):
        eager = next(one for one in rows if one.name == f"{name} eager")
        points[-way] = {"lengths": each.lengths, "eager": _prefill(eager), "graph": _prefill(each)}
    config = VTRConfig(**pruned)
    weight = layers[0].self_attn.k_proj.weight
    found: dict[str, Any] = {
        "about": {
            "backbone": options.backbone,
            "budget": options.budget,
            "strategy": config.strategy,
            "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU, a small size",
            "dtype": str(dtype).removeprefix("torch."),
            "visual": case.visual,
            "tokens": case.tokens,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "commit": commit(),
            "command": "python -m benchmarks.speed " + " ".join(arguments or sys.argv[1:]),
            "ceilings": {"TFLOP/s": top.operations / 1e12, "GB/s": top.bytes / 1e9},
        },
        "rows": [each._asdict() for each in rows],
        "free": alone,
        "floor": {
            "unpruned": ceilings.floor(layers, base.lengths, 1, top),
            "pruned": ceilings.floor(layers, ours.lengths, 1, top),
        },
        "decode_floor": ceilings.decode_floor(case.model, top),
        "operations": {name: _operations(layers, each.lengths) for name, each in zip(ways, (base, ours), strict=True)},
        "kept_bytes": 2 * len(layers) * ours.lengths[-1] * weight.shape[0] * weight.element_size(),
        "curve": [
            point
            | {
                "tokens": sum(point["lengths"]) / len(layers) - text,
                "floor": ceilings.floor(layers, point["lengths"], 1, top),
            }
            for point in points.values()
        ],
        "first_difference": {name: apart(name, given) for name, given in ways.items()},
    }
    folder = Path(options.output)
    folder.mkdir(parents=True, exist_ok=True)
    stem = f"{options.backbone}_{options.strategy}_{options.budget:g}"
    (folder / f"{stem}.json").write_text(json.dumps(found, indent=1))
    picture(found, folder / f"{stem}.png")
    print(tables(found))
    about = found["about"]
    versions = f"torch {about['torch']}, transformers {about['transformers']}, commit {about['commit']}"
    print(f"{about['device']}, {about['dtype']}, {versions}")
    print(f"where the answers of the engines part: {found['first_difference']}")
    print(f"written: {folder / stem}.json and .png")


def _prefill(row: Row) -> float:
    return row.prefill if math.isnan(row.graph) else row.graph


def _operations(layers: Any, lengths: list[int]) -> float:
    return sum(
        length * (ceilings.token_cost(layer, 0) + ceilings.pair_cost(layer) * length / 2)
        for layer, length in zip(layers, lengths, strict=True)
    )


if __name__ == "__main__":
    warnings.simplefilter("default")
    main()
