"""Starts processes that hold one model between them, and says what each of them answered and kept.

Where there is a GPU for each they compute on those and talk through NCCL, else on the CPU through gloo.
"""

import os
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from operator import methodcaller
from pathlib import Path
from typing import Any
from warnings import catch_warnings, filterwarnings

import torch
from fast_checks import Asked, answer, config
from matrix import KINDS, NAMES, cells, runs_on
from torch import Tensor, multiprocessing
from torch import distributed as dist
from torch.utils._pytree import tree_map_only

import strategy
from strategy.distributed import collectives

PATIENCE = 30 * len(NAMES)  # seconds that the processes may take
Build = Callable[[str], Asked]


@dataclass
class Ran:
    """What a process answered and kept, and the means of its record, by strategy and kind of prompt."""

    answers: dict[tuple[str, str], Tensor]
    kept: dict[tuple[str, str], list[tuple[Tensor, ...]]]
    means: dict[tuple[str, str], dict[str, Any]]


@dataclass
class Parted:
    """What several processes found, each with a part of a model, what one did with all of it, and the strategies."""

    ranks: list[dict[str, Any]]
    whole: Ran
    decoder: Any
    names: Sequence[str]


def run(asked: Asked, names: Iterable[str], engine: str = "eager", kinds: Sequence[str] = KINDS) -> Ran:
    """What a model answers; by graph as often as it takes until graphs are replayed, the last time counts."""
    ran, there = Ran({}, {}, {}), methodcaller("to", asked.model.device)
    times = 3 if engine == "graph" and asked.model.device.type == "cuda" else 1
    asked = replace(asked, prompts=tree_map_only(Tensor, there, asked.prompts))
    for name, kind in cells(names):
        if kind not in kinds or not runs_on(asked.model, name):
            continue
        given = {"enabled": False} if name == "unpruned" else {"strategy": name}
        with strategy.prune(asked.model, config(asked, engine=engine, **given)) as record, catch_warnings():
            filterwarnings("error", message=".*with the eager engine")
            for _ in range(times):
                ran.answers[name, kind] = answer(asked, kind, new=6).cpu()
        ran.kept[name, kind] = [tuple(map(Tensor.cpu, stage.kept)) for stage in record.stages]
        ran.means[name, kind] = record.means()
    return ran


def same(ran: Ran, whole: Ran, name: str, kind: str) -> bool:
    """Whether a process answered and kept what one process does with the whole model."""
    kept, expected = (each.kept[name, kind] for each in (ran, whole))
    return torch.equal(ran.answers[name, kind], whole.answers[name, kind]) and all(
        torch.equal(mine, its)
        for stage, other in zip(kept, expected, strict=True)
        for mine, its in zip(stage, other, strict=True)
    )


def _work(rank: int, work: Callable[..., dict[str, Any]], ranks: int, build: Build, folder: Path, gpus: bool) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks)}
    os.environ |= {} if gpus else {"CUDA_VISIBLE_DEVICES": ""}
    torch.set_num_threads(1)
    torch.backends.cudnn.allow_tf32 = False  # convolutions as fine as one process's on the CPU
    dist.init_process_group(
        "nccl" if gpus else "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=ranks
    )
    torch.save(work(rank, ranks, build), folder / f"{rank}.pt")
    collectives.shutdown_process_groups()


def part(work: Callable[..., dict[str, Any]], build: Build, ranks: int, folder: Path) -> Parted:
    """Let so many processes do their work, given rank, ranks and build, and one have all of the model."""
    given = (work, ranks, build, folder, torch.cuda.device_count() >= ranks)
    context = multiprocessing.start_processes(_work, given, ranks, join=False, start_method="spawn")
    try:
        asked = build("cpu")
        whole, late = run(asked, asked.names), time.monotonic() + PATIENCE
        while not context.join(timeout=1):
            assert time.monotonic() < late, f"{ranks} processes took more than {PATIENCE} seconds"
    finally:
        for process in context.processes:
            process.kill()
    found = [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(ranks)]
    return Parted(found, whole, asked.model.get_decoder(), asked.names)
