"""What a device can do at most, and what that makes of a prefill."""

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch

from strategy.kernels.layer_facts import pair_cost, token_cost
from strategy.kernels.layer_spec import llama_spec


class Ceilings(NamedTuple):
    """Operations and bytes a second, as measured."""

    operations: float
    bytes: float


def milliseconds(run: Callable[[], Any], device: torch.device, repeats: int, warm: int = 3) -> float:
    """The median time of a call, in ms, each one waited for: between events on a GPU, by the clock on a CPU."""
    times = []
    for number in range(warm + repeats):
        if device.type == "cuda":
            start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            torch.cuda.synchronize(device)
            start.record()
            run()
            stop.record()
            stop.synchronize()
            spent = start.elapsed_time(stop)
        else:
            since = time.perf_counter()
            run()
            spent = 1000 * (time.perf_counter() - since)
        if number >= warm:
            times.append(spent)
    return statistics.median(times)


def measure(device: torch.device, dtype: torch.dtype) -> Ceilings:
    """The rate of a large product of random matrices, and of a large copy, read and written."""
    side = 8192 if device.type == "cuda" else 512
    left, right = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    product = milliseconds(lambda: left @ right, device, 10)
    block = torch.empty(side * side * (32 if device.type == "cuda" else 1), device=device, dtype=dtype)
    other = torch.empty_like(block)
    copy = milliseconds(lambda: other.copy_(block), device, 10)
    return Ceilings(2000 * side**3 / product, 2000 * block.nbytes / copy)


def floor(layers: Sequence[Any], lengths: Sequence[int], batch: int, ceilings: Ceilings) -> float:
    """The least time, in ms, of a prefill whose layers see these lengths.

    For each layer the larger of its operations (causal attention counts half) at the rate of the large product, and
    of its weights' bytes at that of the large copy.
    """
    total = 0.0
    for layer, length in zip(layers, lengths, strict=True):
        operations = 2 * batch * length * (token_cost(layer, 0) + pair_cost(layer, llama_spec(layer)) * length / 2)
        size = sum(parameter.nbytes for parameter in layer.parameters())
        total += max(operations / ceilings.operations, size / ceilings.bytes)
    return 1000 * total


def decode_floor(model: Any, ceilings: Ceilings) -> float:
    """The least time, in ms, of a decoded token: its weights read once."""
    parts = [*model.get_decoder().layers, model.get_output_embeddings()]
    return 1000 * sum(p.nbytes for part in parts for p in part.parameters()) / ceilings.bytes
