"""The calls of a vision tower and its projector: made once, and then replayed or timed alone."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import cycle
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from benchmarks.measure import attached, captured_graphs
from benchmarks.models import Case
from benchmarks.points import ENOUGH, LEAST
from benchmarks.roofline import Roofline, median_ms, vision_floor
from strategy.backbone import find_backbone
from strategy.pruning.patch import ModelPatch


class VisionCall(NamedTuple):
    """A call of a vision module, with what it returned."""

    module: nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    output: Any


class _DecoderReachedError(Exception):
    """Ends an answer where the visual tokens are made."""


def vision_calls(case: Case, inputs: dict[str, Any]) -> list[VisionCall]:
    """Return how an answer to some inputs calls the vision modules, which run as they are, once.

    Args:
        case: Its model is asked.
        inputs: The keyword arguments of `generate`.
    """
    backbone, calls = find_backbone(case.model), list[VisionCall]()

    def stop(*_: Any) -> None:
        raise _DecoderReachedError

    def add(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        # Some models write into what their towers return.
        calls.append(VisionCall(module, args, kwargs, _with_own_containers(output)))

    handles = [module.register_forward_hook(add, with_kwargs=True) for module in backbone.vision(case.model)]
    handles.append(backbone.decoder(case.model).register_forward_pre_hook(stop))
    try:
        case.model.generate(**inputs, do_sample=False, max_new_tokens=1)
    except _DecoderReachedError:
        pass
    finally:
        for handle in handles:
            handle.remove()
    return calls


def _with_own_containers(output: Any) -> Any:
    return tree_map_only(Tensor, lambda tensor: tensor, output)


@contextmanager
def replayed(case: Case, calls: Sequence[VisionCall]) -> Iterator[None]:
    """Let the vision modules return what they returned before, so that an answer costs what its decoder does.

    Args:
        case: The case, to whose model nothing is attached yet.
        calls: The calls that an answer makes.
    """
    backbone, patch = find_backbone(case.model), ModelPatch()
    with_graphs = backbone.vision_graphs
    for module in {call.module for call in calls}:
        outputs = cycle([call.output for call in calls if call.module is module])
        patch.replace(module, "forward", lambda *_, _outputs=outputs, **__: _with_own_containers(next(_outputs)))
    backbone.vision_graphs = False  # a graph of them would be empty
    try:
        yield
    finally:
        backbone.vision_graphs = with_graphs
        patch.remove()


class TowerPoint(NamedTuple):
    """What the visual tokens of a batch take.

    Attributes:
        value: What is varied.
        batch: How many prompts there are.
        time: Ms of the batch; None where it was not measured.
        floor: The least ms.
        failure: Why it was not measured; else empty.
    """

    value: float
    batch: int
    time: float | None = None
    floor: float | None = None
    failure: str = ""

    def in_words(self) -> str:
        """Return the point as a line."""
        if self.time is None or self.floor is None:
            return f"vision tower, {self.value:g}: not measured, {self.failure}"
        each = f"{self.time / self.batch:.2f} ms a prompt (floor {self.floor / self.batch:.2f})"
        return f"vision tower, {self.value:g}: {each}"


@torch.no_grad()
def measure_tower(
    value: float, case: Case, batch: int, calls: Sequence[VisionCall], repeats: int, roofline: Roofline
) -> TowerPoint:
    """Measure the calls of the vision modules by the graph engine.

    Args:
        value: What is varied.
        case: The case.
        batch: How many prompts there are.
        calls: The calls that an answer makes.
        repeats: How often they are measured; less if they take long.
        roofline: The rates of the device.
    """
    device = case.model.device

    def run() -> None:
        for call in calls:
            call.module(*call.args, **call.kwargs)

    with attached(case, enabled=False, engine="graph") as record:
        run()  # counts the operations, and so compiles nothing
        multiply_adds = record.multiply_adds["vision"] / batch
        run()
        graphs = captured_graphs(case.model, "vision")
        whole = len(graphs) == len(calls)  # and no graph was too large

        def replay() -> None:
            for each in graphs:
                each.graph.replay()

        wanted = replay if whole else run
        once = median_ms(wanted, device, 1, warm_up=0)
        time = median_ms(wanted, device, min(repeats, LEAST if once > 1000 * ENOUGH / repeats else repeats), warm_up=0)
    parts = [*dict.fromkeys(call.module for call in calls)]
    return TowerPoint(value, batch, time, vision_floor(parts, multiply_adds, batch, roofline))
