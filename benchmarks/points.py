"""The points of a curve: a prefill and a decode step of one batch, beside the least time that they can take."""

import statistics
import time
from typing import Any, NamedTuple

import torch

from benchmarks.measure import attached, layer_lengths
from benchmarks.models import Case
from benchmarks.roofline import DecoderLayers, Roofline, decode_floor, prefill_floor
from strategy import RunRecord

WARM_UP = 2  # answers, in which everything is compiled and captured
LEAST, ENOUGH = 2, 1.0  # answers that are measured at least; seconds after which these suffice


class NotByGraphError(RuntimeError):
    """The graph engine left an answer to the stock loop."""


class Point(NamedTuple):
    """What one way to answer takes; ms are None where it was not measured.

    Attributes:
        way: The way.
        value: What is varied.
        batch: How many prompts are answered at once.
        visual: Visual tokens of a prompt.
        stages: Those that each stage kept.
        prefill: Ms of the batch, as its caller waits for it.
        prefill_floor: The least ms, see `roofline.prefill_floor`.
        decode: Ms of a step, which decodes a token of each prompt.
        decode_floor: The least ms, see `roofline.decode_floor`, with what the cache holds in the middle of an answer.
        cache: Bytes that the cache holds then.
        peak: Bytes of all that was allocated.
        graphless: Programs without a CUDA graph, and why.
        failure: Why it was not measured; else empty.
    """

    way: str
    value: float
    batch: int
    visual: int = 0
    stages: tuple[int, ...] = ()
    prefill: float | None = None
    prefill_floor: float | None = None
    decode: float | None = None
    decode_floor: float | None = None
    cache: float = 0
    peak: float = 0
    graphless: tuple[str, ...] = ()
    failure: str = ""

    def in_words(self) -> str:
        """Return the point as a line."""
        what = f"{self.way}, {self.value:g}"
        if self.prefill is None or self.prefill_floor is None:
            return f"{what}: not measured, {self.failure}"
        return (
            f"{what}: prefill {self.prefill / self.batch:.2f} ms a prompt (floor "
            f"{self.prefill_floor / self.batch:.2f}), decode {self.decode:.2f} ms a step (floor "
            f"{self.decode_floor:.2f})"
        )


def measure_point(
    way: str,
    value: float,
    case: Case,
    inputs: dict[str, Any],
    repeats: int,
    new: int,
    roofline: Roofline,
    **options: Any,
) -> Point:
    """Measure one way to answer by the graph engine.

    Args:
        way: The way.
        value: What is varied.
        case: The model and its prompt.
        inputs: The arguments of `generate` for a batch of such prompts.
        repeats: How many answers are measured; fewer if they take long.
        new: How many tokens each has.
        roofline: The rates of the device.
        **options: Those of `strategy.VTRConfig`.

    Raises:
        NotByGraphError: The stock loop answered.
    """
    model, batch, device = case.model, len(inputs["attention_mask"]), case.model.device
    prefills, decodes = list[float](), list[float]()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    with attached(case, engine="graph", **options) as record:
        clock, since = record.clock, 0.0
        for number in range(WARM_UP + repeats):
            if number == WARM_UP:
                since = time.perf_counter()
            if len(decodes) >= LEAST and time.perf_counter() - since > ENOUGH:
                break
            before = clock.seconds()
            model.generate(**inputs, do_sample=False, max_new_tokens=new)
            after = clock.seconds()
            _refuse_stock_loop(record)
            if number >= WARM_UP:
                prefills.append(1000 * (after["prefill"] - before["prefill"]))
                decodes.append(1000 * (after["decode"] - before["decode"]) / (new - 1))
        means = record.means()
        graphless = tuple(f"{each.program}: {each.reason}" for each in record.graph_decisions if _lacks_graph(each))
    layers, lengths = DecoderLayers.of(model), layer_lengths(case, means)
    held = means["cache_length"] + new / 2
    return Point(
        way=way,
        value=value,
        batch=batch,
        visual=case.visual,
        stages=tuple(round(kept) for kept in means["kept_tokens"]),
        prefill=statistics.median(prefills),
        prefill_floor=prefill_floor(layers, lengths, batch, roofline),
        decode=statistics.median(decodes),
        decode_floor=decode_floor(model, roofline, batch, held),
        cache=batch * held * sum(layers.cache_bytes()),
        peak=torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 0,
        graphless=graphless,
    )


def _refuse_stock_loop(record: RunRecord) -> None:
    for decision in record.graph_decisions:
        if decision.action == "stock loop":
            raise NotByGraphError(decision.reason)


def _lacks_graph(decision: Any) -> bool:
    return decision.action in ("rejected", "stock prefill", "not compiled")
