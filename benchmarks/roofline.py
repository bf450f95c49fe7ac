"""The rates that a device reaches at most, and the least time of a prefill and of a decoded token that follows."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import nn

from strategy.backbone import find_backbone
from strategy.kernels.layer_facts import pair_cost, token_cost
from strategy.kernels.layer_spec import LayerSpec, part


class Roofline(NamedTuple):
    """Measured rates.

    Attributes:
        operations: Floating-point operations a second; a multiply-add is two of them.
        bytes: Bytes read and written a second.
    """

    operations: float
    bytes: float

    def in_words(self) -> dict[str, float]:
        """Return the rates with their units."""
        return {"TFLOP/s": self.operations / 1e12, "GB/s": self.bytes / 1e9}

    def least_seconds(self, multiply_adds: float, size: float) -> float:
        """Return the longer one of the time of some operations and the time to read some bytes."""
        return max(2 * multiply_adds / self.operations, size / self.bytes)


class DecoderLayers(NamedTuple):
    """The layers of a model's decoder, their descriptions, and how many experts a token goes through."""

    modules: Sequence[nn.Module]
    specs: Sequence[LayerSpec]
    experts: int

    @classmethod
    def of(cls, model: nn.Module) -> DecoderLayers:
        """Return the layers of a model of a known backbone."""
        backbone = find_backbone(model)
        decoder: Any = backbone.decoder(model)
        return cls(decoder.layers, backbone.layer_specs(decoder), backbone.experts(decoder))

    def multiply_adds(self, lengths: Sequence[int]) -> list[float]:
        """Return the multiply-adds of a prompt in each layer, given its length there; causal attention counts half."""
        return [
            length * (token_cost(layer, self.experts) + pair_cost(layer, spec) * length / 2)
            for layer, spec, length in zip(self.modules, self.specs, lengths, strict=True)
        ]

    def cache_bytes(self) -> list[int]:
        """Return the bytes that each layer keeps of a token: its key and its value."""
        keys: list[Any] = [part(layer, spec.key) for layer, spec in zip(self.modules, self.specs, strict=True)]
        return [2 * each.weight.shape[0] * each.weight.element_size() for each in keys]


def median_ms(run: Callable[[], Any], device: torch.device, repeats: int, warm_up: int = 3) -> float:
    """Return the median time of a call in ms, measured between events on a GPU and by the clock on a CPU.

    Args:
        run: The call; each one is waited for.
        device: Where it runs.
        repeats: How many calls are measured.
        warm_up: How many calls come before these.
    """
    times = []
    for number in range(warm_up + repeats):
        if device.type == "cuda":
            start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            torch.cuda.synchronize(device)
            start.record()
            run()
            stop.record()
            stop.synchronize()
            elapsed = start.elapsed_time(stop)
        else:
            since = time.perf_counter()
            run()
            elapsed = 1000 * (time.perf_counter() - since)
        if number >= warm_up:
            times.append(elapsed)
    return statistics.median(times)


def measure_roofline(device: torch.device, dtype: torch.dtype) -> Roofline:
    """Measure the rates of a product of large random matrices and of a large copy."""
    side = 8192 if device.type == "cuda" else 512
    left, right = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    product = median_ms(lambda: left @ right, device, 10)
    source = torch.empty(side * side * (32 if device.type == "cuda" else 1), device=device, dtype=dtype)
    target = torch.empty_like(source)
    copy = median_ms(lambda: target.copy_(source), device, 10)
    return Roofline(2000 * side**3 / product, 2000 * source.nbytes / copy)


def prefill_floor(layers: DecoderLayers, lengths: Sequence[int], batch: int, roofline: Roofline) -> float:
    """Return the least time of a prefill in ms.

    For each layer this is the longer one of the time of its operations and the time to read its weights.

    Args:
        layers: The layers of the decoder.
        lengths: The length of a prompt in each layer.
        batch: How many prompts there are.
        roofline: The rates of the device.
    """
    total = 0.0
    for layer, multiply_adds in zip(layers.modules, layers.multiply_adds(lengths), strict=True):
        total += roofline.least_seconds(batch * multiply_adds, _bytes([layer]))
    return 1000 * total


def decode_floor(model: Any, roofline: Roofline, batch: int = 1, held: float = 0) -> float:
    """Return the least time of a decode step in ms, in which weights and cache are read once.

    For each layer, and for the output head, this is the longer one of the time of its operations and the time to read.

    Args:
        model: The model.
        roofline: The rates of the device.
        batch: How many samples are decoded at once.
        held: The tokens of each that the cache holds.
    """
    layers, head = DecoderLayers.of(model), model.get_output_embeddings()
    total = roofline.least_seconds(batch * head.weight.numel(), _bytes([head]))
    for layer, spec, cached in zip(layers.modules, layers.specs, layers.cache_bytes(), strict=True):
        multiply_adds = batch * (token_cost(layer, layers.experts) + pair_cost(layer, spec) * held)
        total += roofline.least_seconds(multiply_adds, _bytes([layer]) + batch * held * cached)
    return 1000 * total


def vision_floor(parts: Sequence[nn.Module], multiply_adds: float, batch: int, roofline: Roofline) -> float:
    """Return the least time in ms to make the visual tokens of prompts, see `Roofline.least_seconds`.

    Args:
        parts: The modules that run, the vision tower among them.
        multiply_adds: Theirs for one prompt.
        batch: How many prompts there are.
        roofline: The rates of the device.
    """
    return 1000 * roofline.least_seconds(batch * multiply_adds, _bytes(parts))


def _bytes(parts: Iterable[nn.Module]) -> int:
    return sum(parameter.nbytes for part in parts for parameter in part.parameters())
