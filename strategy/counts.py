"""What a forward call costs: multiply-adds from executed shapes, and seconds that nothing waits for.

A matrix product of [n, k] and [k, m] counts n * k * m; attention is counted in full, as torch counts it,
although a causal kernel needs to compute half of it only.
"""

import time
from collections import defaultdict
from math import prod
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

# torch has no formula for its CPU kernel, which does what those for GPUs do.
ATEN = torch.ops.aten
FORMULAS: dict[Any, Any] = flop_registry | {
    ATEN._scaled_dot_product_flash_attention_for_cpu: flop_registry[ATEN._scaled_dot_product_flash_attention]
}
PENDING = 1000  # pairs of events that wait to be read before the finished ones are


class Counter(TorchDispatchMode):
    """Counts the multiply-adds of whatever runs inside of it, by torch's own formulas."""

    def __init__(self) -> None:
        super().__init__()
        self.total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        known = FORMULAS.get(func._overloadpacket)
        if known is None and func is not torch.ops.prim.device.default:
            with self:
                parts = func.decompose(*args, **kwargs or {})
            if parts is not NotImplemented:
                return parts
        result = func(*args, **kwargs or {})
        if known is not None:
            self.total += known(*args, **kwargs or {}, out_val=result) // 2
        return result


def whole_shape(weight: Tensor) -> torch.Size:
    """The shape of a weight, also where DeepSpeed's ZeRO stage 3 leaves only a share of it between passes."""
    return getattr(weight, "ds_shape", weight.shape)


def token_cost(layer: nn.Module, experts: int) -> int:
    """Multiply-adds of one token with a decoder layer's weights, `experts` of each stack of them."""
    shapes = [shape for parameter in layer.parameters() if len(shape := whole_shape(parameter)) > 1]
    return sum(prod(shape) if len(shape) == 2 else experts * prod(shape[1:]) for shape in shapes)


def pair_cost(layer: Any) -> int:
    """Multiply-adds of attention in a decoder layer for one token that sees one token."""
    return 2 * whole_shape(layer.self_attn.q_proj.weight)[0]


class Moment(NamedTuple):
    """When something began: seconds, or on a GPU an event."""

    at: Any
    device: torch.device


class Clock:
    """Seconds by part; on a GPU between events, which are read when somebody asks."""

    def __init__(self) -> None:
        self.sums: dict[str, float] = defaultdict(float)
        self.pending: list[tuple[str, torch.cuda.Event, torch.cuda.Event]] = []

    def start(self, device: torch.device) -> Moment:
        """A moment on a device."""
        if device.type != "cuda":
            return Moment(time.perf_counter(), device)
        if torch.cuda.is_current_stream_capturing():
            # A graph runs later, and as often as it is replayed.
            return Moment(None, device)
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(device))
        return Moment(event, device)

    def stop(self, part: str, since: Moment) -> None:
        """Add to a part what went by since a moment, on its device."""
        until = self.start(since.device)
        if until.at is None:
            return
        if since.device.type != "cuda":
            self.sums[part] += until.at - since.at
            return
        self.pending.append((part, since.at, until.at))
        if len(self.pending) > PENDING:
            self._read(wait=False)

    def _read(self, wait: bool) -> None:
        waiting, self.pending = self.pending, []
        for part, since, until in waiting:
            if wait:
                until.synchronize()
            if until.query():
                self.sums[part] += since.elapsed_time(until) / 1000
            else:
                self.pending.append((part, since, until))

    def seconds(self) -> dict[str, float]:
        """The sums; waits for the device."""
        self._read(wait=True)
        return dict(self.sums)

    def __deepcopy__(self, memo: Any) -> "Clock":
        # Events cannot be copied, sums can.
        copy = Clock()
        copy.sums.update(self.seconds())
        return copy
