"""Times and memory of one model, unpruned and pruned, in one run."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import strategy
from benchmarks.models import Case, batched
from benchmarks.roofline import median_ms
from strategy.attach import attachment_of
from strategy.backbone import find_backbone
from strategy.graph.cuda_graphs import CapturedGraph, CudaGraphCache, ProgramKey
from strategy.kernels import llama_layer
from strategy.kernels.compile import compiling


class Row(NamedTuple):
    """What one way to answer takes, in ms and bytes.

    Attributes:
        name: The way, with its engine.
        batch: How many prompts are answered at once.
        prefill: The decoder's prefill, as its caller waits for it.
        graph: The CUDA graph of the prefill alone; nan if there is none.
        vision: The CUDA graphs of the vision tower and the projector; nan if there are none.
        decode: A token.
        first: All from the pixels to the first token.
        held: Bytes of the cache after the prefill.
        peak: Bytes of all that was allocated.
        tokens: The answers.
        stages: Visual tokens that each stage kept.
        lengths: The length of the sequence in each layer.
        graph_report: What the graph engine decided, and why, see `RunRecord.graph_report`.
    """

    name: str
    batch: int
    prefill: float
    graph: float
    vision: float
    decode: float
    first: float
    held: float
    peak: float
    tokens: list[list[int]]
    stages: list[int]
    lengths: list[int]
    graph_report: str


@contextmanager
def attached(case: Case, **options: Any) -> Iterator[strategy.RunRecord]:
    """Attach a configuration to a case's model; options are those of `strategy.VTRConfig`."""
    with strategy.prune(case.model, strategy.VTRConfig(**options)) as record:
        yield record


def wall_ms(run: Callable[[], Any], device: torch.device) -> float:
    """Return how long the caller of `run` waits for all its work, in ms."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    since = time.perf_counter()
    run()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return 1000 * (time.perf_counter() - since)


def warm_up(model: Any, generate: Callable[[int], Any], new: int) -> Any:
    """Answer with `new` tokens and with one token until all is captured, and return the last long answer."""
    # The graph engine captures a program when it comes for the second time, and replays it from the third time on.
    for _ in range(1 if attachment_of(model).generator is None else 3):
        answers = generate(new)
        generate(1)
    return answers


def captured_graphs(model: nn.Module, kind: str) -> list[CapturedGraph]:
    """Return the graphs that an attached model has captured of a kind of programs, the least recently used first."""
    generator = attachment_of(model).generator
    return [] if generator is None else generator.decoder.graphs.captured(kind)


def layer_lengths(case: Case, means: dict[str, Any]) -> list[int]:
    """Return the length of the sequence in each layer, given the means of a run record."""
    return [case.tokens - case.visual + round(count) for count in means["tokens_by_layer"]]


def measure_row(name: str, case: Case, batch: int, repeats: int, new: int, **options: Any) -> Row:
    """Measure one way to answer.

    Args:
        name: Names the row.
        case: The model and its prompt.
        batch: How many prompts are answered at once.
        repeats: How often each time is measured.
        new: How many tokens are decoded.
        **options: Those of `strategy.VTRConfig`.
    """
    model, inputs = case.model, batched(case, batch)
    device = model.device
    on_gpu = device.type == "cuda"
    with attached(case, **options) as record:

        def generate(tokens: int) -> Tensor:
            answers: Tensor = model.generate(**inputs, do_sample=False, max_new_tokens=tokens)
            return answers

        answers = warm_up(model, generate, new)
        if on_gpu:
            torch.cuda.reset_peak_memory_stats(device)
        firsts, prefills = [], []
        for _ in range(repeats):
            before = record.clock.seconds().get("prefill", 0.0)
            firsts.append(wall_ms(lambda: generate(1), device))
            prefills.append(1000 * (record.clock.seconds()["prefill"] - before))
        answered = [wall_ms(lambda: generate(new), device) for _ in range(max(2, repeats // 5))]
        first = statistics.median(firsts)
        # Answers of one token and of many fill caches of different sizes, so there is a graph for each.
        graph = _replay_ms(captured_graphs(model, "prefill")[-1:], device, repeats)
        vision = _replay_ms(captured_graphs(model, "vision"), device, repeats)
        means = record.means()
        return Row(
            name=name,
            batch=batch,
            prefill=statistics.median(prefills),
            graph=graph,
            vision=vision,
            decode=(statistics.median(answered) - first) / (new - 1),
            first=first,
            held=means["cache_bytes"] * batch,
            peak=torch.cuda.max_memory_allocated(device) if on_gpu else 0,
            tokens=answers[:, -new:].tolist(),
            stages=[round(kept) for kept in means["kept_tokens"]],
            lengths=layer_lengths(case, means),
            graph_report=record.graph_report(),
        )


def _replay_ms(graphs: Sequence[CapturedGraph], device: torch.device, repeats: int) -> float:
    """Return the ms that some graphs take together; nan without graphs."""
    return sum(median_ms(each.graph.replay, device, repeats) for each in graphs) if graphs else math.nan


@torch.no_grad()
def free_method_prefill(case: Case, lengths: list[int], batch: int, repeats: int) -> float:
    """Measure a prefill by a method that costs nothing: the same layers on sequences that are as short already.

    Args:
        case: The model.
        lengths: The length of the sequence in each layer.
        batch: How many sequences there are.
        repeats: How often the prefill is measured.

    Returns:
        The ms, in which nothing is scored, selected or gathered.
    """
    model = case.model
    device = model.device
    backbone = find_backbone(model)
    decoder: Any = backbone.decoder(model)
    specs = backbone.layer_specs(decoder)
    weights = llama_layer.pack_projections(decoder.layers, specs)
    shape, dtype = llama_layer.layer_shape(decoder.layers[0], specs[0]), weights[0].input_norm.dtype
    start = torch.randn(batch, lengths[0], decoder.config.hidden_size, device=device, dtype=dtype)
    cos, sin = torch.rand(2, batch, lengths[0], shape.width, device=device, dtype=start.dtype)

    def program(x: Tensor) -> Tensor:
        for length, own in zip(lengths, weights, strict=True):
            part = slice(0, length)
            x, _, keys, values = llama_layer.prefill(
                x[:, part].contiguous(), cos[:, part].contiguous(), sin[:, part].contiguous(), own, shape
            )
            keys[:, :, : lengths[-1]].contiguous(), values[:, :, : lengths[-1]].contiguous()
        last: Tensor = decoder.norm(x[:, -1:])
        return last

    try:
        graphs = CudaGraphCache(device, limit=1 << 62)
        with compiling(device.type == "cuda"):
            for _ in range(3):
                graphs.run(ProgramKey("free"), program, [start])
        captured = graphs.captured("free")
        return median_ms(captured[0].graph.replay if captured else lambda: program(start), device, repeats)
    finally:
        llama_layer.unpack_projections(decoder.layers, specs, weights)


def first_difference(case: Case, ours: list[int], theirs: list[int], **options: Any) -> dict[str, float] | None:
    """Return where the answers of two engines differ first, and how near that is to a tie in the eager engine.

    Args:
        case: The model and its prompt.
        ours: The answer of another engine.
        theirs: The answer of the eager engine.
        **options: Those of `strategy.VTRConfig`.

    Returns:
        None where the answers are equal; otherwise token, its position; gap, between the logits of both choices; and
        deviation, the standard deviation of all logits there.
    """
    at = next((place for place, (a, b) in enumerate(zip(ours, theirs, strict=True)) if a != b), None)
    if at is None:
        return None
    with attached(case, engine="eager", **options):
        found = case.model.generate(
            **case.inputs, do_sample=False, max_new_tokens=at + 1, return_dict_in_generate=True, output_scores=True
        )
    logits = found.scores[at][0].float()
    return {"token": at, "gap": float(logits[theirs[at]] - logits[ours[at]]), "deviation": float(logits.std())}
