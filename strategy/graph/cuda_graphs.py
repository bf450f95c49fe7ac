"""Captured CUDA graphs: a few, for programs that come again in the same shapes."""

from __future__ import annotations

import warnings
from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.utils._pytree import tree_map_only

from strategy.distributed import collectives
from strategy.kernels.errors import first_line

MAX_MEMORY_FRACTION = 0.25  # of the device's memory that graphs may hold
MIN_REPLAYS = 8  # replays that outweigh a capture
Report = Callable[[str, str, str], None]
"""Is called with a program, what was decided about its graph, and why."""


@dataclass(frozen=True)
class ProgramKey:
    """Tells a program, and the shapes of its inputs, from others.

    kind: "vision", "prefill" or "decode". details: What the graph depends on. label: The same for people, without
    what they cannot read.
    """

    kind: str
    details: Hashable = ()
    label: str = ""

    def __str__(self) -> str:
        return f"{self.kind} {self.label}".strip()


@dataclass
class CapturedGraph:
    """A captured program with the tensors it reads and those it leaves.

    size: The bytes that are its own. replays: How often it was replayed.
    """

    graph: torch.cuda.CUDAGraph
    program: Callable[..., Any]
    inputs: Sequence[Tensor]
    outputs: Any
    size: int
    replays: int = 0


class CudaGraphCache:
    """Runs programs; captures a program the second time it comes, and replays its graph from then on.

    All graphs compute in the same memory, since what a graph leaves is copied before the next one is replayed. On a CPU
    every program just runs.

    Args:
        device: Where the programs run.
        limit: How many bytes the graphs may hold together. The least recently used are evicted first; a graph that was
            evicted twice before `MIN_REPLAYS` replays is not captured again, nor one that is too large alone. Without a
            limit, `MAX_MEMORY_FRACTION` of the device's memory.
        group: Ranks that run the same programs, which wait for each other inside. Each captures and evicts what the
            others do, and they hold at most half of the memory that is free.
        report: See `Report`.
    """

    def __init__(
        self,
        device: torch.device,
        limit: int | None = None,
        group: ProcessGroup | None = None,
        report: Report = lambda *_: None,
    ) -> None:
        self.device, self.limit, self.group, self.report = device, limit, group, report
        if limit is None and device.type == "cuda":
            self.limit = self._default_limit()
        if group is not None:
            collectives.clear_before_shutdown(self)
        self.graphs: OrderedDict[ProgramKey, CapturedGraph] = OrderedDict()
        self.seen_once: set[ProgramKey] = set()
        self.evicted_once: set[ProgramKey] = set()
        self.rejected: dict[ProgramKey, str] = {}
        self.shared = 0  # bytes of the memory in which all graphs compute
        self.stream: torch.cuda.Stream | None = None  # on which graphs are captured
        self.poisoned_pools: set[Any] = set()  # memory in which a capture failed, and where torch begins no other

    def _default_limit(self) -> int:
        limit = int(MAX_MEMORY_FRACTION * torch.cuda.get_device_properties(self.device).total_memory)
        if self.group is None:
            return limit
        free, _ = torch.cuda.mem_get_info(self.device)
        free += torch.cuda.memory_reserved(self.device) - torch.cuda.memory_allocated(self.device)
        [least] = collectives.all_reduce_min([min(limit, free // 2)], self.device, self.group)
        return least

    def run(
        self,
        key: ProgramKey,
        program: Callable[..., Any],
        inputs: Sequence[Tensor] = (),
        size: int = 0,
        warmup: bool = False,
    ) -> Any:
        """Return what a program returns for its inputs; earlier results stay as they were.

        Args:
            key: Tells the program, and the shapes of its inputs, from others.
            program: Called with the inputs. It waits for nothing, and all else that it reads stays where it is.
            size: Bytes that live as long as the graph, besides what is captured.
            warmup: Whether to run the program once more before the capture, for a program that still compiles or
                caches something.
        """
        if self.device.type != "cuda":
            return program(*inputs)
        # The device need not be the GPU that is current where this is called.
        with torch.cuda.device(self.device):
            return self._run(key, program, inputs, size, warmup)

    def _run(
        self, key: ProgramKey, program: Callable[..., Any], inputs: Sequence[Tensor], size: int, warmup: bool
    ) -> Any:
        if key not in self.seen_once:
            self.seen_once.add(key)
            # Of shapes that never come again there may be many, which are one line of a report.
            self.report(key.kind, "ran without a graph", "first time of these shapes")
            return program(*inputs)
        if key not in self.rejected and key not in self.graphs:
            self._capture(key, program, inputs, size, warmup)
        if key in self.rejected:
            self.report(str(key), "ran without a graph", self.rejected[key])
            return program(*inputs)
        self.graphs.move_to_end(key)
        known = self.graphs[key]
        for static, given in zip(known.inputs, inputs, strict=True):
            static.copy_(given, non_blocking=True)
        known.replays += 1
        known.graph.replay()
        return tree_map_only(Tensor, torch.clone, known.outputs)

    def _capture(
        self, key: ProgramKey, program: Callable[..., Any], inputs: Sequence[Tensor], size: int, warmup: bool
    ) -> bool:
        graph, static = torch.cuda.CUDAGraph(), [tensor.clone() for tensor in inputs]
        failure = ""
        if warmup:
            program(*static)
        if not self.graphs:
            self.shared = 0
        pools = {known.graph.pool() for known in self.graphs.values()} - self.poisoned_pools
        pool = pools.pop() if pools else torch.cuda.graph_pool_handle()
        try:
            # The outer context restores the stream, which a failed capture does not. Other threads may go on.
            here = torch.cuda.stream(torch.cuda.current_stream(self.device))
            # Torch's own stream for captures is one of the card of a process's first capture.
            self.stream = self.stream or torch.cuda.Stream(self.device)
            with here, torch.cuda.graph(graph, pool, self.stream, capture_error_mode="thread_local"):
                before = torch.cuda.memory_reserved(self.device)
                try:
                    outputs = program(*static)
                finally:
                    self.shared += torch.cuda.memory_reserved(self.device) - before
        except RuntimeError as error:
            # Without memory, a model that is not split falls back to the stock loop.
            if self.group is None and isinstance(error, torch.cuda.OutOfMemoryError):
                raise
            failure = first_line(error)
            # Otherwise torch would refuse random numbers, as during a capture.
            random = torch.cuda.default_generators[torch.cuda.current_device()]
            random.graphsafe_set_state(random.clone_state())
            self.poisoned_pools.add(pool)
        # The worst result of all ranks counts, so that all decide alike.
        fine, room = collectives.all_reduce_min([not failure, -self.shared], self.device, self.group)
        self.shared = -room
        if not fine:
            why = f"capture failed: {failure}" if failure else "capture failed on another rank"
            warnings.warn(f"{key}: runs without a CUDA graph ({why})", stacklevel=2)
            self._reject(key, why)
            return False
        self._keep(key, CapturedGraph(graph, program, static, outputs, size + sum(each.nbytes for each in static)))
        return key in self.graphs

    def _keep(self, key: ProgramKey, graph: CapturedGraph) -> None:
        """Keep a graph, if it fits, and evict others for it."""
        if self.limit is not None and self.shared + graph.size > self.limit:
            needed = self.shared + graph.size
            self._reject(key, f"too large: {needed} bytes with the shared memory, of {self.limit} allowed")
            if self.size > self.limit:
                # The shared memory stays as long as any graph does; the others are captured again.
                for other in self.graphs:
                    self.report(str(other), "evicted", f"the memory shared with {key} is too large")
                self.graphs.clear()
            return
        self.graphs[key] = graph
        self.report(str(key), "captured", "its shapes came for the second time")
        while self.limit is not None and self.size > self.limit:
            oldest, evicted = self.graphs.popitem(last=False)
            self.report(str(oldest), "evicted", f"the graphs need more than {self.limit} bytes together")
            if evicted.replays < MIN_REPLAYS:
                if oldest in self.evicted_once:
                    self._reject(oldest, f"evicted twice before {MIN_REPLAYS} replays")
                else:
                    self.evicted_once.add(oldest)

    def _reject(self, key: ProgramKey, why: str) -> None:
        self.rejected[key] = why
        self.report(str(key), "rejected", why)

    def captured(self, kind: str) -> list[CapturedGraph]:
        """Return the captured graphs of a kind of programs, the least recently used first."""
        return [graph for key, graph in self.graphs.items() if key.kind == kind]

    @property
    def size(self) -> int:
        """Return the bytes that all graphs hold."""
        return sum(graph.size for graph in self.graphs.values()) + (self.shared if self.graphs else 0)

    def clear(self) -> None:
        """Free every graph."""
        for known in (self.graphs, self.seen_once, self.evicted_once, self.rejected, self.poisoned_pools):
            known.clear()
