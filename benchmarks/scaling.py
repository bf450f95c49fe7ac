"""Measure how a backbone answers on several GPUs: a copy on each, or one model split or sharded over all of them.

A launcher such as `python -m torch.distributed.run` starts it once a GPU.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch.profiler import ProfilerActivity, profile
from tqdm import tqdm

import strategy
from benchmarks.measure import answering, warm_up
from benchmarks.models import BACKBONES, Case, build
from benchmarks.report import scaling_table
from benchmarks.speed import DTYPES, about, knob, numbers
from strategy import parallel, ranks, zero

# What is added up or collected over the GPUs, by how the kernels of NCCL and the calls of gloo are named.
COLLECTIVES = {"all-reduce": ("AllReduce", "gloo:all_reduce"), "all-gather": ("AllGather", "gloo:all_gather")}


class Scaled(NamedTuple):
    """What one way to answer takes on all processes together, in ms and bytes; of the slowest or largest of them.

    prefill: as its caller waits for it; decode: a token. rate: answers a second of all. weights: bytes of the model in
    one GPU, between answers; peak: of all that was allocated there. collectives: ms in them during a prefill, by kind,
    the wait for the others included. stages: visual tokens kept.
    """

    name: str
    prefill: float
    decode: float
    rate: float
    weights: float
    peak: float
    collectives: dict[str, float]
    stages: list[int]


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--backbone", required=True, choices=BACKBONES)
    parser.add_argument("--budget", default="192", help="keep_tokens, or up to 1 retain_ratio; several, such as 192,64")
    parser.add_argument("--strategy", default="clse", choices=strategy.available())
    parser.add_argument("--tensor_parallel", default="1", help="processes that a model is split over")
    parser.add_argument("--zero_stage", default="0", help="3: shard the weights over all processes")
    parser.add_argument("--device", choices=("cuda", "cpu"), help="the GPU of each process, else a small size on a CPU")
    parser.add_argument("--dtype", choices=DTYPES, help="float16 on a GPU, else float32")
    parser.add_argument("--new", type=int, default=24, help="tokens decoded an answer")
    parser.add_argument("--repeats", type=int, default=15, help="times that a median is taken of, and answers counted")
    parser.add_argument("--output", default="results/scaling", help="folder for the JSON")
    return parser.parse_args(arguments)


def loaded(options: argparse.Namespace, device: torch.device, dtype: torch.dtype) -> tuple[Case, bool]:
    """The case, split or sharded as asked, and whether it is so."""
    shares = parallel.read_ranks(options.tensor_parallel)
    sharded = zero.read_stage(options.zero_stage, shares)
    apart = shares > 1 or sharded
    case = build(options.backbone, str(device), dtype, small=device.type == "cpu", apart=apart)
    parallel.split(case.model, case.model.get_decoder(), shares)
    if sharded:
        zero.shard(case.model, case.model.get_decoder())
    return case, apart


def scaled(name: str, case: Case, device: torch.device, repeats: int, new: int, **knobs: Any) -> Scaled:
    """Measure one way to answer, in all processes at once; knobs are those of `strategy.VTRConfig`."""
    on_gpu = device.type == "cuda"
    weights = torch.cuda.memory_allocated(device) if on_gpu else _bytes(case.model)
    with answering(case, **knobs) as run:

        def generate(tokens: int) -> Any:
            # The tokens are read, as by whoever asks for them.
            return case.model.generate(**case.inputs, do_sample=False, max_new_tokens=tokens).tolist()

        warm_up(case.model, generate, new)
        if on_gpu:
            torch.cuda.reset_peak_memory_stats(device)
        ranks.gather(None)
        begun = time.time()
        for _ in range(repeats):
            generate(new)
        ended = time.time()
        firsts, prefills = [], []
        for _ in range(repeats):
            since, before = time.time(), run.clock.seconds()["prefill"]
            generate(1)
            firsts.append(time.time() - since)
            prefills.append(1000 * (run.clock.seconds()["prefill"] - before))
        decode = 1000 * ((ended - begun) / repeats - statistics.median(firsts)) / (new - 1)
        peak = torch.cuda.max_memory_allocated(device) if on_gpu else 0
        inside = _collectives(lambda: generate(1), device)
        kept = run.means()["kept_tokens"]
    everyone = ranks.gather([begun, ended, decode, statistics.median(prefills), weights, peak])
    begun = min(first for first, *_ in everyone)
    ended, decode, prefill, weights, peak = (max(each) for each in [*zip(*everyone, strict=True)][1:])
    return Scaled(name, prefill, decode, repeats / (ended - begun), weights, peak, inside, [round(n) for n in kept])


def _bytes(model: Any) -> int:
    return sum(parameter.nbytes for parameter in model.parameters())


def _collectives(run: Callable[[], Any], device: torch.device) -> dict[str, float]:
    """The ms that a call spends in collectives, by kind."""
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA][: 1 + (device.type == "cuda")]) as seen:
        run()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
    spent = dict.fromkeys(COLLECTIVES, 0.0)
    for event in seen.key_averages():
        for kind, (kernel, call) in COLLECTIVES.items():
            if event.key.startswith("nccl") and kernel in event.key:
                spent[kind] += event.self_device_time_total / 1000
            elif event.key.startswith(call):
                spent[kind] += event.cpu_time_total / 1000
    return spent


def main(arguments: list[str] | None = None) -> None:
    """Measure, and let the first process print the table and write the JSON."""
    options = parse(arguments)
    command = "-m benchmarks.scaling " + " ".join(sys.argv[1:] if arguments is None else arguments)
    device = torch.device(options.device if options.device == "cpu" else ranks.take_device())
    dtype = DTYPES[options.dtype] if options.dtype else torch.float32 if device.type == "cpu" else torch.float16
    since = time.time()
    try:
        case, apart = loaded(options, device, dtype)
    except ValueError as error:
        raise SystemExit(str(error)) from None
    if not ranks.rank():
        print(f"loaded: {time.time() - since:.0f} s", file=sys.stderr, flush=True)
    workers = ranks.count() // int(options.tensor_parallel)
    ways: dict[str, dict[str, Any]] = {"unpruned": {"enabled": False}}
    ways |= {
        f"pruned {each:g}": {"strategy": options.strategy, **knob(each)} for each in numbers(options.budget, float)
    }
    told = about(options, case, device, dtype, command) | {"processes": ranks.count()}
    kind = f"tensor{options.tensor_parallel}" if workers < ranks.count() else f"zero{options.zero_stage}"
    file = Path(options.output) / f"{options.backbone}_{ranks.count()}_{kind if apart else 'data'}.json"
    rows = []
    for way in tqdm(ways, desc="Measuring", unit="way", disable=ranks.rank() > 0):
        engine = "eager" if apart else "auto"
        found = scaled(way, case, device, options.repeats, options.new, engine=engine, **ways[way])
        rows.append(found._replace(rate=found.rate * workers))
        if not ranks.rank():
            # At once, since a run on several GPUs may be ended before it is through.
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(json.dumps({"about": told, "rows": [each._asdict() for each in rows]}, indent=1))
    if not ranks.rank():
        print(scaling_table(told, rows))
        print(f"written: {file}")


if __name__ == "__main__":
    main()
