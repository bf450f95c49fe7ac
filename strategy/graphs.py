"""Captured CUDA graphs: a few, for what comes again in the same shapes."""

from __future__ import annotations

import warnings
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.utils._pytree import tree_map_only

from strategy import parallel

SHARE = 0.25  # of the device's memory that graphs may hold
WORTH = 8  # replays that outweigh a capture


def reason(error: Exception) -> str:
    """The first line of what an error tells, or else its name."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


@dataclass
class Graph:
    """A captured program with the tensors it reads and those it leaves.

    size: the bytes that are its own; uses: how often it was replayed.
    """

    graph: torch.cuda.CUDAGraph
    program: Callable[..., Any]
    inputs: Sequence[Tensor]
    outputs: Any
    size: int
    uses: int = 0


class Beside:
    """A second stream: what is put there runs beside what follows on the first one, in a capture too.

    On a CPU it runs at once.
    """

    def __init__(self, device: torch.device) -> None:
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self.busy = False

    @contextmanager
    def running(self) -> Iterator[None]:
        """Put there what is run inside, once all before it is done."""
        if self.stream is None:
            yield
            return
        self.stream.wait_stream(torch.cuda.current_stream())
        self.busy = True
        with torch.cuda.stream(self.stream):
            yield

    def wait(self) -> None:
        """Let what follows wait for all that was put there; until then its inputs must be kept."""
        # A capture must not wait for a stream that it has put nothing on.
        if self.stream is not None and self.busy:
            torch.cuda.current_stream().wait_stream(self.stream)
            self.busy = False


class Graphs:
    """Runs programs; captures one when it comes for the second time, and replays it from then on.

    All compute in the same memory, since what one leaves is copied before the next one is replayed. limit: how many
    bytes the graphs may hold together; the least recently used go first, and what had to go twice before it was of use
    is not captured again, nor what is too large alone. A quarter of the device's memory if not given. group: ranks that
    run the same programs, which wait for each other inside: each captures and drops what the others do, and they hold
    at most half of the memory that is left. On a CPU every program just runs.
    """

    def __init__(self, device: torch.device, limit: int | None = None, group: ProcessGroup | None = None) -> None:
        self.device, self.limit, self.group = device, limit, group
        if limit is None and device.type == "cuda":
            self.limit = int(SHARE * torch.cuda.get_device_properties(device).total_memory)
            if group is not None:
                free, _ = torch.cuda.mem_get_info(device)
                free += torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
                [self.limit] = parallel.least_of_all([min(self.limit, free // 2)], device, group)
        if group is not None:
            parallel.USERS.add(self)
        self.kept: OrderedDict[Hashable, Graph] = OrderedDict()
        self.seen: set[Hashable] = set()
        self.gone: set[Hashable] = set()
        self.never: set[Hashable] = set()
        self.shared = 0  # bytes of the memory in which all compute
        self.spoilt: set[Any] = set()  # memory in which a capture failed, and where torch begins no other

    def run(
        self,
        key: Hashable,
        program: Callable[..., Any],
        inputs: Sequence[Tensor] = (),
        size: int = 0,
        rehearse: bool = False,
    ) -> Any:
        """What a program gives for its inputs; whatever it gave before stays as it was.

        key: tells it, and the shapes of its inputs, from others. program: called with the inputs; it waits for
        nothing, and all else that it reads stays where it is. size: bytes that live as long as the graph beside what
        is captured. rehearse: run it once more before it is captured, for one that then still compiles or remembers.
        """
        if self.device.type != "cuda":
            return program(*inputs)
        # Which need not be the GPU that is current where this is called.
        with torch.cuda.device(self.device):
            return self._run(key, program, inputs, size, rehearse)

    def _run(
        self, key: Hashable, program: Callable[..., Any], inputs: Sequence[Tensor], size: int, rehearse: bool
    ) -> Any:
        if key in self.never or key not in self.seen:
            self.seen.add(key)
            return program(*inputs)
        if key not in self.kept and not self._capture(key, program, inputs, size, rehearse):
            return program(*inputs)
        self.kept.move_to_end(key)
        known = self.kept[key]
        for static, given in zip(known.inputs, inputs, strict=True):
            static.copy_(given, non_blocking=True)
        known.uses += 1
        known.graph.replay()
        return tree_map_only(Tensor, torch.clone, known.outputs)

    def _capture(
        self, key: Hashable, program: Callable[..., Any], inputs: Sequence[Tensor], size: int, rehearse: bool
    ) -> bool:
        graph, static = torch.cuda.CUDAGraph(), [tensor.clone() for tensor in inputs]
        failure = ""
        if rehearse:
            program(*static)
        if not self.kept:
            self.shared = 0
        pools = {known.graph.pool() for known in self.kept.values()} - self.spoilt
        pool = pools.pop() if pools else torch.cuda.graph_pool_handle()
        try:
            # Other threads may go on with what they do.
            # The outer stream is there to be gone back to, which a capture that fails forgets.
            here = torch.cuda.stream(torch.cuda.current_stream(self.device))
            with here, torch.cuda.graph(graph, pool, capture_error_mode="thread_local"):
                before = torch.cuda.memory_reserved(self.device)
                try:
                    outputs = program(*static)
                finally:
                    self.shared += torch.cuda.memory_reserved(self.device) - before
        except RuntimeError as error:
            # Out of memory, a model that is not split has another way to go on.
            if self.group is None and isinstance(error, torch.cuda.OutOfMemoryError):
                raise
            failure = reason(error)
            # Else torch's random numbers would be refused, as in a capture that goes on.
            random = torch.cuda.default_generators[torch.cuda.current_device()]
            random.graphsafe_set_state(random.clone_state())
            self.spoilt.add(pool)
        # As it went in the process where it went worst.
        fine, room = parallel.least_of_all([not failure, -self.shared], self.device, self.group)
        self.shared = -room
        if not fine:
            why = failure or "by another process"
            warnings.warn(f"{key}: runs without a CUDA graph, since it cannot be captured ({why})", stacklevel=2)
            self.never.add(key)
            return False
        self._keep(key, Graph(graph, program, static, outputs, size + sum(tensor.nbytes for tensor in static)))
        return key in self.kept

    def _keep(self, key: Hashable, graph: Graph) -> None:
        """Keep a graph, if it fits, and let others go for it."""
        if self.limit is not None and self.shared + graph.size > self.limit:
            self.never.add(key)
            if self.size > self.limit:
                # What it computes in stays as long as any of them does; the others come again.
                self.kept.clear()
            return
        self.kept[key] = graph
        while self.limit is not None and self.size > self.limit:
            oldest, dropped = self.kept.popitem(last=False)
            if dropped.uses < WORTH:
                (self.never if oldest in self.gone else self.gone).add(oldest)

    @property
    def size(self) -> int:
        """The bytes that all graphs hold."""
        return sum(graph.size for graph in self.kept.values()) + (self.shared if self.kept else 0)

    def clear(self) -> None:
        """Free every graph."""
        for known in (self.kept, self.seen, self.gone, self.never, self.spoilt):
            known.clear()
