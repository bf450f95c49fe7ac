"""Measure how a backbone answers on several GPUs: a copy on each, or one model split or sharded over all of them.

A launcher such as `python -m torch.distributed.run` starts it once a GPU.
"""

import argparse
import json
import statistics
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch.profiler import ProfilerActivity, profile
from tqdm import tqdm

import strategy
from benchmarks.measure import answering, warm_up
from benchmarks.models import Case, build
from benchmarks.report import scaling_table
from benchmarks.speed import about, dtype_of, parser_of, ways_of
from strategy.distributed import collectives, processes, tensor_parallel, zero

# What is added up or collected over the GPUs, by how the kernels of NCCL and the calls of gloo are named.
COLLECTIVES = {
    "all-reduce": ("AllReduce", "gloo:all_reduce"),
    "all-gather": ("AllGather", "gloo:all_gather"),
    "broadcast": ("Broadcast", "gloo:broadcast"),
}


class Scaled(NamedTuple):
    """What one way to answer takes, in ms and bytes, of the slowest or largest of all processes.

    prefill: as its caller waits for it; decode: a token. rate: answers a second of all together. weights: bytes of the
    model in one GPU, between answers; peak: of all that was allocated there. stages: visual tokens kept. collectives:
    ms in them during a prefill, by kind, see `collectives`.
    """

    name: str
    prefill: float
    decode: float
    rate: float
    weights: float
    peak: float
    stages: list[int]
    collectives: dict[str, float]


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = parser_of(__doc__, new=24, output="results/scaling")
    parser.add_argument("--tensor_parallel", default="1", help="processes that a model is split over")
    parser.add_argument("--zero_stage", default="0", help="3: shard the weights over all processes")
    parser.add_argument("--engine", default="auto", help="how answers are made, as in VTRConfig")
    parser.add_argument("--device", choices=("cuda", "cpu"), help="the GPU of each process, else a small size on a CPU")
    options = parser.parse_args(arguments)
    if options.new < 2 or options.repeats < 1:
        parser.error(f"--new {options.new} --repeats {options.repeats}: want at least 2 tokens, and 1 time")
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: there is no GPU; allowed here is --device cpu, which measures a small size")
    try:
        options.ways = ways_of(options)
        for knobs in options.ways.values():
            strategy.VTRConfig(engine=options.engine, **knobs)
        options.shares = tensor_parallel.parse_tp_size(options.tensor_parallel)
        options.sharded = zero.parse_zero_stage(options.zero_stage, options.shares)
    except ValueError as error:
        parser.error(str(error))
    if options.sharded and options.engine == "graph":
        parser.error("--engine graph: sharded weights (ZeRO stage 3) are read by the stock loop only, --engine eager")
    return options


def load(options: argparse.Namespace, device: torch.device, dtype: torch.dtype) -> Case:
    """The case, split or sharded as asked."""
    to_split = options.shares > 1 or options.sharded
    case = build(options.backbone, str(device), dtype, small=device.type == "cpu", to_split=to_split)
    tensor_parallel.split(case.model, case.model.get_decoder(), options.shares)
    if options.sharded:
        zero.shard(case.model, case.model.get_decoder())
    return case


def measure(name: str, case: Case, copies: int, repeats: int, new: int, **knobs: Any) -> Scaled:
    """Measure one way to answer, in all processes at once, which hold so many copies of the model.

    knobs: those of `strategy.VTRConfig`.
    """
    device = case.model.device
    on_gpu = device.type == "cuda"
    weights = torch.cuda.memory_allocated(device) if on_gpu else _bytes(case.model)
    generate = partial(_answer, case)
    with answering(case, **knobs) as run:
        warm_up(case.model, generate, new)
        if on_gpu:
            torch.cuda.reset_peak_memory_stats(device)
        collectives.gather(None)
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
        kept = run.means()["kept_tokens"]
    mine = [begun, ended, decode, statistics.median(prefills), weights, peak]
    first, *others = zip(*collectives.gather(mine), strict=True)
    ended, decode, prefill, weights, peak = map(max, others)
    rate = copies * repeats / (ended - min(first))
    return Scaled(name, prefill, decode, rate, weights, peak, [round(each) for each in kept], {})


def _answer(case: Case, tokens: int) -> Any:
    # Read, as by whoever asks for them.
    return case.model.generate(**case.inputs, do_sample=False, max_new_tokens=tokens).tolist()


def _bytes(model: Any) -> int:
    """The bytes of a process's own weights: with ZeRO these are a share of what a parameter stands for."""
    return sum(getattr(parameter, "ds_tensor", parameter).nbytes for parameter in model.parameters())


def collective_times(case: Case, peers: int, **knobs: Any) -> dict[str, float]:
    """The ms that a prefill spends in collectives, by kind: of each one that of the process which waited least in it.

    peers: how many processes take part in each; of several such groups the largest sum. To be called when all times are
    measured: once it has run, the profiler slows down every launch that follows.
    """
    device, generate = case.model.device, partial(_answer, case)
    with answering(case, **knobs):
        warm_up(case.model, generate, 1)
        collectives.gather(None)
        with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA][: 1 + (device.type == "cuda")]) as seen:
            generate(1)
    mine: dict[str, list[float]] = {kind: [] for kind in COLLECTIVES}
    for event in sorted(seen.events(), key=lambda event: event.time_range.start):
        for kind, (kernel, call) in COLLECTIVES.items():
            if event.name.startswith(call) or (event.name.startswith("nccl") and kernel in event.name):
                mine[kind].append(event.time_range.elapsed_us() / 1000)
    everyones = collectives.gather(mine)
    groups = [everyones[first : first + peers] for first in range(0, len(everyones), peers)]
    return {
        kind: max(sum(map(min, zip(*(each[kind] for each in group), strict=True))) for group in groups)
        for kind in COLLECTIVES
    }


def main(arguments: list[str] | None = None) -> None:
    """Measure, and let the first process print the table and write the JSON."""
    options = parse(arguments)
    command = "-m benchmarks.scaling " + " ".join(sys.argv[1:] if arguments is None else arguments)
    device = torch.device(options.device if options.device == "cpu" else processes.take_device())
    dtype = dtype_of(options, device)
    since = time.time()
    try:
        case = load(options, device, dtype)
    except (ValueError, ImportError) as error:
        raise SystemExit(f"--backbone {options.backbone}: {error}") from None
    if not processes.rank():
        processes.log_line(f"loaded: {time.time() - since:.0f} s")
    told = about(options, case, device, dtype, command) | {"processes": processes.world_size()}
    kind = f"zero{options.zero_stage}" if options.sharded else f"tensor{options.shares}"
    words = [options.backbone, options.strategy, options.budget.replace(",", "_")]
    words += [kind, f"of{processes.world_size()}", options.engine]
    file, rows = Path(options.output) / f"{'_'.join(words)}.json", []

    def write() -> None:
        # At once, since a run on several GPUs may be ended before it is through.
        if not processes.rank():
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(json.dumps({"about": told, "rows": [each._asdict() for each in rows]}, indent=1))

    world = processes.world_size()
    copies, peers = world // options.shares, world if options.sharded else options.shares
    with tqdm(total=2 * len(options.ways), desc="Measuring", unit="way", disable=processes.rank() > 0) as bar:
        for way, knobs in options.ways.items():
            rows.append(measure(way, case, copies, options.repeats, options.new, engine=options.engine, **knobs))
            write()
            bar.update()
        for place, knobs in enumerate(options.ways.values()):
            rows[place] = rows[place]._replace(
                collectives=collective_times(case, peers, engine=options.engine, **knobs)
            )
            write()
            bar.update()
    if not processes.rank():
        print(scaling_table(told, rows))
        print(f"written: {file}")


if __name__ == "__main__":
    main()
