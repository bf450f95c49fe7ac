"""Times and memory of one model, unpruned and pruned, in one run."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor

import strategy
from benchmarks.ceilings import milliseconds
from benchmarks.models import Case, batched
from strategy.attach import attachment_of
from strategy.backbone import find_backbone
from strategy.graph.cuda_graphs import CudaGraphCache, ProgramKey
from strategy.kernels import llama_layer
from strategy.kernels.compile import compiling


class Row(NamedTuple):
    """What one way to answer takes, in ms and bytes.

    prefill: the decoder's, as its caller waits for it. graph: that of its program alone, and vision: that of the tower
    and the projector; nan if none ran. decode: a
    token. first: the whole way from pixels to the first token. held: bytes of the cache behind the prefill; peak: of
    all that was allocated. stages: visual tokens kept, lengths: of the sequence at each layer.
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


@contextmanager
def answering(case: Case, **knobs: Any) -> Iterator[strategy.RunRecord]:
    """Attach a configuration to the case's model."""
    with strategy.prune(
        case.model, strategy.VTRConfig(**(case.prune if knobs.get("enabled", True) else {}), **knobs)
    ) as run:
        yield run


def _synchronised(run: Callable[[], Any], device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    since = time.perf_counter()
    run()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return 1000 * (time.perf_counter() - since)


def warm_up(model: Any, generate: Callable[[int], Any], new: int) -> Any:
    """Answer with `new` tokens and with one as often as it takes until all is captured; gives the last long answer."""
    # What comes for the third time is replayed by the fast path.
    for _ in range(1 if attachment_of(model).generator is None else 3):
        answers = generate(new)
        generate(1)
    return answers


def row(name: str, case: Case, batch: int, repeats: int, new: int, **knobs: Any) -> Row:
    """Measure one way to answer; `new` tokens are decoded, and knobs are those of `strategy.VTRConfig`."""
    model, inputs = case.model, batched(case, batch)
    device = model.device
    on_gpu = device.type == "cuda"
    with answering(case, **knobs) as run:

        def generate(tokens: int) -> Tensor:
            return model.generate(**inputs, do_sample=False, max_new_tokens=tokens)

        answers = warm_up(model, generate, new)
        if on_gpu:
            torch.cuda.reset_peak_memory_stats(device)
        firsts, prefills = [], []
        for _ in range(repeats):
            before = run.clock.seconds().get("prefill", 0.0)
            firsts.append(_synchronised(lambda: generate(1), device))
            prefills.append(1000 * (run.clock.seconds()["prefill"] - before))
        whole = [_synchronised(lambda: generate(new), device) for _ in range(max(2, repeats // 5))]
        first = statistics.median(firsts)
        generator = attachment_of(model).generator
        graphs = None if generator is None else generator.decoder.graphs
        # A graph for answers of one token and one for those of many, which fill caches of different sizes.
        graph = next(iter(_replayed(graphs, "prefill", device, repeats)[-1:]), math.nan)
        vision = sum(_replayed(graphs, "vision", device, repeats)) or math.nan
        means = run.means()
        stages = [round(kept) for kept in means["kept_tokens"]]
        lengths = [case.tokens - case.visual + round(n) for n in means["tokens_by_layer"]]
        peak = torch.cuda.max_memory_allocated(device) if on_gpu else 0
        return Row(
            name=name,
            batch=batch,
            prefill=statistics.median(prefills),
            graph=graph,
            vision=vision,
            decode=(statistics.median(whole) - first) / (new - 1),
            first=first,
            held=means["cache_bytes"] * batch,
            peak=peak,
            tokens=answers[:, -new:].tolist(),
            stages=stages,
            lengths=lengths,
        )


def _replayed(graphs: CudaGraphCache | None, kind: str, device: torch.device, repeats: int) -> list[float]:
    """The ms that each captured graph of a kind takes."""
    captured = graphs.captured(kind) if graphs else []
    return [milliseconds(each.graph.replay, device, repeats) for each in captured]


@torch.no_grad()
def free(case: Case, lengths: list[int], batch: int, repeats: int) -> float:
    """The ms of the same layers on sequences that are as short already, with nothing scored, sorted or gathered."""
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
        return decoder.norm(x[:, -1:])

    try:
        graphs = CudaGraphCache(device, limit=1 << 62)
        with compiling(device.type == "cuda"):
            for _ in range(3):
                graphs.run(ProgramKey("free"), program, [start])
        captured = graphs.captured("free")
        return milliseconds(captured[0].graph.replay if captured else lambda: program(start), device, repeats)
    finally:
        llama_layer.unpack_projections(decoder.layers, specs, weights)


def first_difference(case: Case, ours: list[int], theirs: list[int], **knobs: Any) -> dict[str, float] | None:
    """Where the answers of two engines part, and how near to a tie that is in the eager engine; None if nowhere.

    token: which one; gap: between the logits of both choices; deviation: of all logits there, to compare with.
    """
    at = next((place for place, (a, b) in enumerate(zip(ours, theirs, strict=True)) if a != b), None)
    if at is None:
        return None
    with answering(case, engine="eager", **knobs):
        found = case.model.generate(
            **case.inputs, do_sample=False, max_new_tokens=at + 1, return_dict_in_generate=True, output_scores=True
        )
    logits = found.scores[at][0].float()
    return {"token": at, "gap": float(logits[theirs[at]] - logits[ours[at]]), "deviation": float(logits.std())}
