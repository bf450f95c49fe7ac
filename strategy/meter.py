"""What the forward calls of one model cost, counted into its record."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from strategy.call import Call
from strategy.counts import Counter, pair_cost, token_cost
from strategy.fusing import fusing
from strategy.record import RunRecord


class Meter:
    """Counts multiply-adds by executed shapes, and seconds, of the parts of a model.

    layers: the decoder's; experts: how many of a mixture a token goes through.
    """

    def __init__(self, record: RunRecord, call: Call, layers: Iterable[nn.Module], experts: int) -> None:
        self.record, self.call = record, call
        self.costs = [(token_cost(layer, experts), pair_cost(layer)) for layer in layers]
        # What was counted once for given shapes need not be counted again.
        self.known: dict[Any, int] = {}
        self.head = 0  # multiply-adds of one token

    def hooks(self, vision: Iterable[nn.Module], head: nn.Module) -> list[RemovableHandle]:
        """The hooks on the modules beside the decoder."""
        weight: Any = head.weight
        self.head = weight.numel()
        handles = [head.register_forward_hook(self._count_head)]
        for module in vision:
            handles.append(module.register_forward_pre_hook(self._begin_vision, with_kwargs=True))
            handles.append(module.register_forward_hook(self._end_vision, always_call=True))
        return handles

    def prefill(self, batch: int, lengths: Iterable[int], part: str = "prefill") -> None:
        """Count the first layers for sequences of these lengths, one a layer."""
        for (token, pair), length in zip(self.costs, lengths, strict=False):
            self.record.multiply_adds[part] += batch * length * (token + length * pair)

    def decoded(self, batch: int, new: int, held: int) -> None:
        """Count tokens decoded on a cache that then holds `held`."""
        self.record.decoded += batch * new
        self.record.multiply_adds["decode"] += sum(batch * new * (token + held * pair) for token, pair in self.costs)

    def decoded_alone(self, batch: int, held: int, until: int) -> None:
        """Count tokens decoded one by one and chosen from, from a cache that held so many to one that holds more."""
        for now in range(held + 1, until + 1):
            self.decoded(batch, 1, now)
        self.record.multiply_adds["decode"] += batch * (until - held) * self.head

    @contextmanager
    def scoring(self, *shapes: Any) -> Iterator[None]:
        """Count what runs inside, which is the same for the same shapes."""
        if shapes not in self.known:
            # Not fused: torch's formulas are those of single operations, and it compiles nothing under a mode.
            with fusing(False), Counter() as counter:
                yield
            self.known[shapes] = counter.total
        else:
            yield
        self.record.multiply_adds["scoring"] += self.known[shapes]

    def _begin_vision(self, module: nn.Module, args: tuple[Any, ...], call: dict[str, Any]) -> None:
        self.close()
        given = [value for value in (*args, *call.values()) if torch.is_tensor(value)]
        # Whole numbers, such as the grids of pictures of many sizes, decide which patches see each other.
        shapes = [(value.shape, None if value.is_floating_point() else str(value.tolist())) for value in given]
        key = ("vision", id(module), *shapes)
        counter = None if key in self.known else Counter()
        # Inputs may lie elsewhere: towers fetch them.
        self.call.vision = key, counter, self.record.clock.start(next(module.parameters()).device)
        if counter:
            counter.__enter__()

    def _end_vision(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if self.call.vision is None:
            return
        key, counter, since = self.call.vision
        self.close()
        if output is None:  # it failed
            return
        if counter:
            self.known[key] = counter.total
        self.record.multiply_adds["vision"] += self.known[key]
        self.record.clock.stop("vision", since)

    def close(self) -> None:
        """Stop counting what a vision module does; an interrupt from the keyboard leaves it open."""
        if self.call.vision is not None and self.call.vision[1] is not None:
            self.call.vision[1].__exit__(None, None, None)
        self.call.vision = None

    def _count_head(self, module: Any, args: tuple[Any, ...], output: Tensor) -> None:
        if self.call.part:
            part = "head" if self.call.part == "prefill" else "decode"
            self.record.multiply_adds[part] += self.head * (output.numel() // output.shape[-1])
