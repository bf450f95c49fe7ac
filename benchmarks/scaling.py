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
from benchmarks.command_line import common_parser, dtype_of, facts, ways_of
from benchmarks.measure import attached, warm_up
from benchmarks.models import Case, build
from benchmarks.report import scaling_table
from strategy.distributed import collectives, processes, tensor_parallel, zero
from strategy.evaluation.files import write_whole

COLLECTIVES = {  # how kernels of NCCL and calls of gloo are named
    "all-reduce": ("AllReduce", "gloo:all_reduce"),
    "all-gather": ("AllGather", "gloo:all_gather"),
    "broadcast": ("Broadcast", "gloo:broadcast"),
}


class ScaledRow(NamedTuple):
    """What one way to answer takes, in ms and bytes, in the slowest or largest of all processes.

    Attributes:
        name: The way.
        prefill: The decoder's prefill, as its caller waits for it.
        decode: A token.
        rate: Answers a second of all processes together.
        weights: Bytes of the model on one GPU, between answers.
        peak: Bytes of all that was allocated there.
        stages: Visual tokens that each stage kept.
        collectives: Ms of a prefill by kind of collective, see `collective_times`.
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
    """Parse the command line."""
    parser = common_parser(__doc__, new=24, output="results/scaling")
    parser.add_argument("--repeats", type=int, default=15, help="times that each is measured")
    parser.add_argument("--tensor_parallel", default="1", help="processes that a model is split over")
    parser.add_argument("--zero_stage", default="0", help="3: shard the weights over all processes")
    parser.add_argument("--engine", default="auto", help="how answers are made, as in VTRConfig")
    parser.add_argument("--device", choices=("cuda", "cpu"), help="the GPU of each process, else a small size on a CPU")
    given = parser.parse_args(arguments)
    if given.new < 2 or given.repeats < 1:
        parser.error(f"--new {given.new} --repeats {given.repeats}: want at least 2 tokens, and 1 time")
    if given.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: there is no GPU; allowed here is --device cpu, which measures a small size")
    try:
        given.ways = ways_of(given)
        strategy.VTRConfig(engine=given.engine)
        given.tp_size = tensor_parallel.parse_tp_size(given.tensor_parallel)
        given.sharded = zero.parse_zero_stage(given.zero_stage, given.tp_size)
    except ValueError as error:
        parser.error(str(error))
    if given.sharded and given.engine == "graph":
        parser.error("--engine graph: sharded weights (ZeRO stage 3) are read by the stock loop only, --engine eager")
    return given


def load(given: argparse.Namespace, device: torch.device, dtype: torch.dtype) -> Case:
    """Return the case, split or sharded as the command line has it."""
    to_split = given.tp_size > 1 or given.sharded
    case = build(given.backbone, str(device), dtype, small=device.type == "cpu", to_split=to_split)
    decoder = case.model.get_decoder()
    if given.tp_size > 1:
        for part in (decoder.norm, decoder.rotary_emb):
            part.to("cpu")  # beside the layers, of which `split` tries one before it moves all
    tensor_parallel.split(case.model, decoder, given.tp_size)
    if given.sharded:
        zero.shard(case.model, decoder)
    return case


def measure(name: str, case: Case, copies: int, repeats: int, new: int, **options: Any) -> ScaledRow:
    """Measure one way to answer, in all processes at once.

    Args:
        name: Names the row.
        case: The model and its prompt.
        copies: How many copies of the model the processes hold together.
        repeats: How often each time is measured.
        new: How many tokens are decoded.
        **options: Those of `strategy.VTRConfig`.
    """
    device = case.model.device
    on_gpu = device.type == "cuda"
    weights = torch.cuda.memory_allocated(device) if on_gpu else _bytes(case.model)
    generate = partial(_answer, case)
    with attached(case, **options) as record:
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
            since, before = time.time(), record.clock.seconds()["prefill"]
            generate(1)
            firsts.append(time.time() - since)
            prefills.append(1000 * (record.clock.seconds()["prefill"] - before))
        decode = 1000 * ((ended - begun) / repeats - statistics.median(firsts)) / (new - 1)
        peak = torch.cuda.max_memory_allocated(device) if on_gpu else 0
        kept = record.means()["kept_tokens"]
    mine = [begun, ended, decode, statistics.median(prefills), weights, peak]
    first, *others = zip(*collectives.gather(mine), strict=True)
    ended, decode, prefill, weights, peak = map(max, others)
    rate = copies * repeats / (ended - min(first))
    return ScaledRow(name, prefill, decode, rate, weights, peak, [round(each) for each in kept], {})


def _answer(case: Case, tokens: int) -> Any:
    # A list has been copied from the device, so the answers are there.
    return case.model.generate(**case.inputs, do_sample=False, max_new_tokens=tokens).tolist()


def _bytes(model: Any) -> int:
    """Return the bytes of a process's own weights; with ZeRO these are a share of each parameter."""
    return sum(getattr(parameter, "ds_tensor", parameter).nbytes for parameter in model.parameters())


def collective_times(case: Case, peers: int, **options: Any) -> dict[str, float]:
    """Measure the ms of a prefill that collectives take by kind, each in the process that waited least in it.

    Call this when all times are measured, since the profiler slows down every launch that follows.

    Args:
        case: The model and its prompt.
        peers: How many processes take part in a collective. Of several such groups, the largest sum counts.
        **options: Those of `strategy.VTRConfig`.
    """
    device, generate = case.model.device, partial(_answer, case)
    with attached(case, **options):
        warm_up(case.model, generate, 1)
        collectives.gather(None)
        with profile(
            activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA][: 1 + (device.type == "cuda")]
        ) as profiled:
            generate(1)
    mine: dict[str, list[float]] = {kind: [] for kind in COLLECTIVES}
    for event in sorted(profiled.events(), key=lambda event: event.time_range.start):
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
    """Measure; the first process prints the table and writes the JSON."""
    given = parse(arguments)
    command = "-m benchmarks.scaling " + " ".join(sys.argv[1:] if arguments is None else arguments)
    device = torch.device(given.device if given.device == "cpu" else processes.take_device())
    dtype = dtype_of(given, device)
    since = time.time()
    try:
        case = load(given, device, dtype)
    except (ValueError, ImportError) as error:
        raise SystemExit(f"--backbone {given.backbone}: {error}") from None
    if not processes.rank():
        processes.log_line(f"loaded: {time.time() - since:.0f} s")
    about = facts(given, case, device, dtype, command) | {"processes": processes.world_size()}
    kind = f"zero{given.zero_stage}" if given.sharded else f"tensor{given.tp_size}"
    words = [given.backbone, given.strategy, given.budget.replace(",", "_")]
    words += [kind, f"of{processes.world_size()}", given.engine]
    file = Path(given.output) / f"{'_'.join(words)}.json"
    rows: list[ScaledRow] = []

    def write() -> None:
        # The file is written after every row, since a run on several GPUs may be stopped.
        if not processes.rank():
            content = {"about": about, "rows": [each._asdict() for each in rows]}
            write_whole(file, json.dumps(content, indent=1).encode())

    world = processes.world_size()
    copies, peers = world // given.tp_size, world if given.sharded else given.tp_size
    with tqdm(total=2 * len(given.ways), desc="Measuring", unit="way", disable=processes.rank() > 0) as bar:
        for way, options in given.ways.items():
            rows.append(measure(way, case, copies, given.repeats, given.new, engine=given.engine, **options))
            write()
            bar.update()
        for place, options in enumerate(given.ways.values()):
            rows[place] = rows[place]._replace(
                collectives=collective_times(case, peers, engine=given.engine, **options)
            )
            write()
            bar.update()
    if not processes.rank():
        print(scaling_table(about, rows))
        print(f"written: {file}")


if __name__ == "__main__":
    main()
