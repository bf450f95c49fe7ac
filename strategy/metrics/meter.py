"""What the forward calls of one model cost, counted into its record."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from strategy.kernels.arguments import named_arguments
from strategy.kernels.compile import compiling
from strategy.kernels.layer_facts import pair_cost, token_cost
from strategy.kernels.layer_spec import LayerSpec
from strategy.kernels.transfers import host_copy
from strategy.metrics.macs import MacCounter
from strategy.metrics.record import RunRecord
from strategy.metrics.thread_state import ThreadState
from strategy.metrics.timing import Timestamp

Pieces = Callable[[nn.Module, Mapping[str, Any]], Sequence[int] | None]


class _Current(ThreadState):
    """The forward call that a thread is in.

    phase: What the call counts as, "prefill" or "decode"; None for a prompt without visual tokens. since: When the
    decoder began. vision: The call of a vision module that the thread is in.
    """

    phase: str | None = None
    since: Timestamp | None = None
    vision: VisionCall | None = None


class VisionCall(NamedTuple):
    """A call of a vision module: its key, the pieces of a new size, the counter that runs, and when it began."""

    key: Any
    pieces: Sequence[int] | None
    counter: MacCounter | None
    since: Timestamp


class VisionRate(NamedTuple):
    """What a vision module cost once, from which follows what other pieces cost, see `Backbone.pieces`.

    pairwise: See `MacCounter`, for `pairs` pairs of tokens. others: All other multiply-adds, for `tokens` tokens.
    """

    pairwise: int
    pairs: int
    others: int
    tokens: int

    @classmethod
    def of(cls, counter: MacCounter, pieces: Sequence[int]) -> VisionRate:
        """Return what a counter saw in a call with pieces of these lengths."""
        pairs, others = sum(length**2 for length in pieces), counter.total - counter.pairwise
        return cls(counter.pairwise, pairs, others, sum(pieces))

    def cost(self, pieces: Sequence[int]) -> int:
        """Return the multiply-adds for pieces of some lengths."""
        pairs = sum(length**2 for length in pieces)
        return self.pairwise * pairs // self.pairs + self.others * sum(pieces) // self.tokens


class CostMeter:
    """Counts multiply-adds, by executed shapes, and seconds of the parts of a model.

    Args:
        record: Where the sums go.
        layers: The decoder's layers.
        specs: Their descriptions.
        experts: How many experts of a mixture a token goes through.
    """

    def __init__(
        self, record: RunRecord, layers: Iterable[nn.Module], specs: Sequence[LayerSpec], experts: int
    ) -> None:
        self.record, self.current = record, _Current()
        self.costs = [
            (token_cost(layer, experts), pair_cost(layer, spec)) for layer, spec in zip(layers, specs, strict=True)
        ]
        # What was counted once for given shapes need not be counted again.
        self.known: dict[Any, int] = {}
        self.rates: dict[nn.Module, VisionRate] = {}
        self.pieces: Pieces = lambda *_: None
        self.head_cost = 0  # multiply-adds of one token

    def hooks(self, vision: Iterable[nn.Module], head: nn.Module, pieces: Pieces) -> list[RemovableHandle]:
        """Register the hooks on the modules beside the decoder.

        Args:
            vision: The vision modules.
            head: The output head.
            pieces: See `Backbone.pieces`.
        """
        self.pieces = pieces
        weight: Any = head.weight
        self.head_cost = weight.numel()
        handles = [head.register_forward_hook(self._count_head)]
        for module in vision:
            handles.append(module.register_forward_pre_hook(self._begin_vision, with_kwargs=True))
            handles.append(module.register_forward_hook(self._end_vision, always_call=True))
        return handles

    @property
    def phase(self) -> str | None:
        """What the forward call of this thread counts as: "prefill" or "decode"; None for text alone."""
        return self.current.phase

    @property
    def counts_vision(self) -> bool:
        """Whether the operations of a vision module are being counted one by one."""
        return self.current.vision is not None and self.current.vision.counter is not None

    def begin_decoder(self, phase: str | None, device: torch.device) -> None:
        """Start the decoder's time, for a call that counts as `phase`."""
        self.current.phase, self.current.since = phase, self.record.clock.start(device)

    def end_decoder(self) -> None:
        """Add the decoder's time to its phase."""
        if self.current.phase is not None and self.current.since is not None:
            self.record.clock.stop(self.current.phase, self.current.since)

    def prefill(self, batch: int, lengths: Iterable[int], phase: str = "prefill") -> None:
        """Count the first layers for sequences of these lengths, one length for each layer."""
        for (token, pair), length in zip(self.costs, lengths, strict=False):
            self.record.multiply_adds[phase] += batch * length * (token + length * pair)

    def decoded(self, batch: int, new: int, held: int) -> None:
        """Count `new` tokens a sample decoded on a cache that then holds `held` tokens."""
        self.record.decoded += batch * new
        self.record.multiply_adds["decode"] += sum(batch * new * (token + held * pair) for token, pair in self.costs)

    def decoded_stepwise(self, batch: int, held: int, until: int) -> None:
        """Count decode steps (with the output head) while the cache grows from `held` to `until` tokens."""
        for now in range(held + 1, until + 1):
            self.decoded(batch, 1, now)
        self.record.multiply_adds["decode"] += batch * (until - held) * self.head_cost

    @contextmanager
    def scoring(self, *shapes: Any) -> Iterator[None]:
        """Count what runs inside as scoring; the same shapes cost the same."""
        if shapes not in self.known:
            # torch's formulas are those of single operations, and torch compiles nothing under a dispatch mode.
            with compiling(False), MacCounter() as counter:
                yield
            self.known[shapes] = counter.total
        else:
            yield
        self.record.multiply_adds["scoring"] += self.known[shapes]

    def _begin_vision(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.close()
        given = [value for value in (*args, *kwargs.values()) if torch.is_tensor(value)]
        # Integers, such as the grids of pictures of many sizes, decide which patches see each other.
        integers = [None if value.is_floating_point() else str(host_copy(value).tolist()) for value in given]
        shapes = zip((value.shape for value in given), integers, strict=True)
        key = ("vision", id(module), *shapes)
        pieces = None
        if key not in self.known:
            # The instance's own forward may hide the names.
            pieces = self.pieces(module, named_arguments(type(module).forward, (module, *args)) | kwargs)
            if pieces is not None and module in self.rates:
                self.known[key] = self.rates[module].cost(pieces)
        counter = None if key in self.known else MacCounter()
        # The inputs may lie on another device, since towers move them.
        since = self.record.clock.start(next(module.parameters()).device)
        self.current.vision = VisionCall(key, pieces, counter, since)
        if counter:
            counter.__enter__()

    def _end_vision(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if self.current.vision is None:
            return
        key, pieces, counter, since = self.current.vision
        self.close()
        if output is None:  # the module raised
            return
        if counter:
            self.known[key] = counter.total
            if pieces and counter.pairwise:  # which is 0 where torch knows no formula, as for other libraries' kernels
                self.rates[module] = VisionRate.of(counter, pieces)
        self.record.multiply_adds["vision"] += self.known[key]
        self.record.clock.stop("vision", since)

    def recount_vision(self) -> None:
        """Forget what the vision module has done so far, since it begins again."""
        call = self.current.vision
        if call is not None and call.counter is not None:
            call.counter.total = call.counter.pairwise = 0

    def close(self) -> None:
        """Stop counting what a vision module does, which a keyboard interrupt leaves running."""
        if self.current.vision is not None and self.current.vision.counter is not None:
            self.current.vision.counter.__exit__(None, None, None)
        self.current.vision = None

    def _count_head(self, module: Any, args: tuple[Any, ...], output: Tensor) -> None:
        if self.phase:
            part = "head" if self.phase == "prefill" else "decode"
            self.record.multiply_adds[part] += self.head_cost * (output.numel() // output.shape[-1])
