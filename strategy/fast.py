"""Greedy answers with no host between the tokens: fused layers, caches of fixed size, CUDA graphs.

The stock `generate` prepares an answer, and its loop makes the first token; meanwhile the decoder's forward call is one
program over all layers, which prunes by the engine's own code. The tokens behind it come from a second program that
reads and writes a cache of fixed size, so that one graph serves every step.
"""

from __future__ import annotations

import copy
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import chain
from operator import attrgetter
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor, nn
from torch._dynamo.exc import TorchDynamoException
from torch.utils._pytree import tree_flatten, tree_map_only, tree_unflatten

from strategy import cache as kv
from strategy import fused, ranks
from strategy.attention import rows_of
from strategy.backbone import Asked, Backbone, Layout, Span
from strategy.base import Plan
from strategy.call import Answer, Call
from strategy.fusing import fusing
from strategy.graphs import Beside, Graphs, reason
from strategy.meter import Meter
from strategy.parallel import of_first
from strategy.prefill import Prefill
from strategy.prior import reordered
from strategy.record import Stage
from strategy.slots import ENDS, Slots

BUCKET = 16  # tokens; prompts are filled up to a multiple, so that few graphs serve all lengths of text
ROOM = 64  # slots; the same for caches
LEG = 256  # tokens that are decoded before a longer cache is needed
TOGETHER = 4  # layers whose keys and values go into their slots in one go, beside the layers that follow
BEHIND = 2  # steps that the host looks for the end of an answer behind the device
VERSION = attrgetter("_version")
WAYS_OUT = (torch.cuda.OutOfMemoryError, TorchDynamoException)  # what the fast path has another way around
TOO_SMALL = "the GPU's memory is too small for graphs and their caches beside the model"


class Hidden(dict[str, Any]):
    """What the decoder's forward call gives to the stock model, read as that reads the outputs of transformers."""

    def __init__(self, hidden: Tensor, cache: Any) -> None:
        super().__init__(last_hidden_state=hidden, past_key_values=cache)

    def __getattr__(self, name: str) -> Any:
        return self.get(name)

    def __getitem__(self, name: Any) -> Any:
        return list(self.values())[name] if isinstance(name, int) else super().__getitem__(name)


class Fast:
    """The fast path of one attached model.

    mode: `VTRConfig.engine`, auto or graph. unfit: why its layers cannot be fused, if so. prune, close: the engine's,
    see `Engine._prune` and `Engine._close`.
    """

    def __init__(
        self,
        model: Any,
        decoder: Any,
        backbone: Backbone,
        plan: Plan | None,
        mode: str,
        unfit: str | None,
        call: Call,
        meter: Meter,
        prune: Callable[..., Tensor],
        close: Callable[[Prefill], int],
    ) -> None:
        self.parts: tuple[Any, ...] = (model, decoder, backbone, plan, mode, unfit, call, meter, prune, close)
        self.model, self.decoder, self.backbone, self.plan = model, decoder, backbone, plan
        self.call, self.meter, self.prune, self.close = call, meter, prune, close
        self.mode, self.unfit = mode, unfit
        # A graph has one set of inputs, so one thread at a time.
        self.lock = threading.RLock()
        self.told: set[str] = set()
        self.broken: str | None = None
        self.fuse = True
        self.engine = getattr(prune, "__self__", None)
        self.weights: list[fused.Weights] = []
        self.graphs = Graphs(torch.device("cpu"))
        self.beside = Beside(torch.device("cpu"))
        self.signature: Sequence[Any] = ()
        self.modules: list[tuple[dict[str, Any], str, Any]] = []
        self.holders: list[dict[str, Any]] = []
        self.scoring: dict[Any, int] = {}
        self.caches: WeakValueDictionary[tuple[int, int], Slots] = WeakValueDictionary()

    def __deepcopy__(self, memo: Any) -> Fast:
        # Graphs read the weights of the model that they were captured with, so a copy begins without any.
        other = memo[id(self)] = Fast.__new__(Fast)
        other.__init__(*(copy.deepcopy(part, memo) for part in self.parts))  # type: ignore[misc]
        return other

    # The stock loop's place.

    def answer(self, stock: Callable[[Any], Tensor], asked: Asked) -> Tensor:
        """What the stock greedy loop gives: the prompts' token ids [B, S] and those of their answers.

        stock: that loop, told when to stop.
        """
        why = self._why_not(asked)
        if why is not None:
            self._tell(why)
            return stock(asked.criteria)
        while True:
            with self.lock:
                before = self.meter.record.sums()
                self.call.answer = Answer(asked.limit or 1)
                try:
                    self._make_ready()
                    return self._answer(stock(asked.one_token()), asked, self.call.answer)
                except WAYS_OUT as error:
                    failure = error
                finally:
                    self.call.answer = None
                self.meter.record.restore(before)
                self._make_do(failure)
                del failure  # and with it what its frames hold
            if self.broken:
                return stock(asked.criteria)

    def _why_not(self, asked: Asked) -> str | None:
        """Why an answer is left to the stock loop, if it is; empty if nobody wanted anything else."""
        if self.mode == "auto" and not next(self.decoder.parameters()).is_cuda:
            return ""
        longest = getattr(self.decoder.config, "max_position_embeddings", 0)
        reasons = {
            self.unfit: self.unfit,
            self.broken: self.broken,
            "more than token ids are asked for, such as scores or a streamer": not asked.plain,
            "logits processors change or forbid tokens": len(asked.processors),
            "answers may stop for other reasons than their length and end tokens": asked.limit is None,
            f"answers may end with more than {ENDS} tokens": len(asked.ends) > ENDS,
            "the prompts follow a filled cache": kv.length(asked.cache),
            f"prompt and answer may outgrow the model's {longest} positions": asked.prompt + (asked.limit or 0)
            > longest,
            "somebody else has hooks on the decoder's layers": self._hooked(),
            "the model is being trained": self.model.training,
        }
        return next((reason for reason, applies in reasons.items() if applies), None)

    def _hooked(self) -> bool:
        hooks = (
            chain(layer._forward_hooks.values(), layer._forward_pre_hooks.values()) for layer in self.decoder.layers
        )
        owners = (getattr(getattr(hook, "func", hook), "__self__", None) for hook in chain.from_iterable(hooks))
        return any(owner is not self.engine for owner in owners)

    def _tell(self, why: str) -> None:
        if why and why not in self.told:
            self.told.add(why)
            warnings.warn(f"engine={self.mode}: answering with the eager engine, since {why}", stacklevel=2)

    def _make_do(self, error: Exception) -> None:
        """Free all, and do without graphs, or without fused layers, from now on.

        Raises RuntimeError for a decoder that is split, whose other processes wait in the pass that has failed here.
        """
        self.free()
        if fused.group_of(self.decoder.layers) is not None:
            raise RuntimeError(
                f"engine={self.mode}: {reason(error)}; the processes that share a model cannot go on from that, "
                "engine=eager needs the least memory and no compiler"
            ) from error
        if isinstance(error, torch.cuda.OutOfMemoryError):
            self.broken = TOO_SMALL
            self._tell(self.broken)
            return
        warnings.warn(f"layers are not fused, since they cannot be compiled ({reason(error)})", stacklevel=2)
        self.fuse = False

    def _make_ready(self) -> None:
        """Lay the weights out; anew, and without the graphs that read them, after a change of theirs."""
        if self.signature and self.signature == self._signature():
            return
        self.free()
        with _plain():
            layers = self.decoder.layers
            self.weights = fused.merge(layers)
        self.shape = fused.shape_of(layers[0])
        self.graphs = Graphs(next(layers.parameters()).device, group=fused.group_of(layers))
        self.beside = Beside(self.graphs.device)
        self.signature = self._signature()

    def _signature(self) -> Sequence[Any]:
        """What tells the model's tensors from any they may be changed into or exchanged for."""
        if not self.holders or any(holder.get(name) is not module for holder, name, module in self.modules):
            every = list(self.model.modules())
            self.modules = [(m._modules, name, child) for m in every for name, child in m._modules.items()]
            self.holders = [holder for m in every for holder in (m._parameters, m._buffers) if holder]
        tensors = [tensor for holder in self.holders for tensor in holder.values() if tensor is not None]
        try:
            versions = [*map(VERSION, tensors)]
        except RuntimeError:  # those made in inference mode count none
            versions = [0 if tensor.is_inference() else tensor._version for tensor in tensors]
        return [*map(Tensor.data_ptr, tensors)], versions

    def free(self) -> None:
        """Free graphs and caches, and give each weight memory of its own again."""
        self.graphs.clear()
        if self.weights:
            fused.split(self.decoder.layers, self.weights)
        self.signature, self.scoring = (), {}

    def _answer(self, prompts: Tensor, asked: Asked, answer: Answer) -> Tensor:
        """Go on from prompts [B, S + 1] that end with the first token of their answers."""
        slots, rest = answer.slots, answer.limit - 1
        with _plain():
            prompts = of_first(prompts, self.graphs.group)
            if slots is None or not rest:
                return prompts
            slots.begin(prompts[:, -1], asked.ends, asked.pad or 0)
            legs, held = [prompts], answer.held
            since = self.meter.record.clock.start(prompts.device)
            over = bool(slots.finished.all())
            while rest and not over:
                if held == slots.length:
                    longer = self._slots(len(prompts), held + min(rest, LEG))
                    longer.take_over(slots)
                    slots = longer
                steps, over = self._leg(slots, min(rest, slots.length - held))
                legs.append(slots.tokens[:, :steps].clone())
                slots.step.zero_()
                rest, held = rest - steps, held + steps
        if self.call.part:
            self.meter.record.clock.stop("decode", since)
            self.meter.decoded_alone(len(prompts), answer.held, held)
        return torch.cat(legs, dim=1)

    def _leg(self, slots: Slots, most: int) -> tuple[int, bool]:
        """Decode up to so many tokens a sample; how many it were, and whether all samples are finished."""
        ranks.Watch.begin()
        on_gpu = slots.token.is_cuda
        flags = torch.zeros(most, dtype=torch.bool, pin_memory=on_gpu)
        events = [torch.cuda.Event() for _ in range(most)] if on_gpu else []
        key, program = ("decode", len(slots.token), slots.length), partial(self._decode, slots)
        for step in range(most + BEHIND):
            if step < most:
                with self._fusing("decoding", self.fuse):
                    self.graphs.run(key, program, size=slots.nbytes)
                flags[step : step + 1].copy_(slots.all_finished, non_blocking=True)
                if on_gpu:
                    events[step].record()
            behind = step - BEHIND
            if behind >= 0:
                if on_gpu:
                    events[behind].synchronize()
                if flags[behind]:
                    return behind + 1, True
        return most, False

    # What replaces the forward calls of the model's parts while an answer is made.

    def see(self, module: nn.Module, stock: Callable[..., Any], *args: Any, **call: Any) -> Any:
        """The forward call of a module that makes visual tokens."""
        device = next(module.parameters()).device
        if device.type != "cuda" or self.broken or self.unfit or torch.is_grad_enabled():
            return stock(*args, **call)
        with self.lock:
            try:
                if self.call.answer is None:
                    self._make_ready()
                return self._see(module, stock, device, *args, **call)
            except WAYS_OUT as error:
                if self.call.answer is not None:
                    raise
                failure = error
            self._make_do(failure)
            del failure
        return self.see(module, stock, *args, **call)

    def _see(self, module: nn.Module, stock: Callable[..., Any], device: torch.device, *args: Any, **call: Any) -> Any:
        leaves, spec = tree_flatten((args, call))
        places = [place for place, leaf in enumerate(leaves) if torch.is_tensor(leaf) and leaf.is_floating_point()]
        # Whole numbers, such as the sizes of pictures, decide about shapes; on the CPU they can be read in a capture.
        leaves = [leaf.cpu() if torch.is_tensor(leaf) and not leaf.is_floating_point() else leaf for leaf in leaves]
        given = [leaves[place].to(device, non_blocking=True) for place in places]
        others = [
            leaf.tolist() if torch.is_tensor(leaf) else leaf for place, leaf in enumerate(leaves) if place not in places
        ]
        known: dict[str, Any] = {}

        def program(*pixels: Tensor) -> Any:
            filled = [pixels[places.index(place)] if place in places else leaf for place, leaf in enumerate(leaves)]
            its_args, its_call = tree_unflatten(filled, spec)
            with _remembering(module, self.backbone.of_sizes, known):
                return stock(*its_args, **its_call)

        key = ("vision", id(module), str(others), *((pixels.shape, pixels.dtype) for pixels in given))
        counted = self.call.vision is not None and self.call.vision[1] is not None  # operation by operation
        with _plain(), self._fusing("seeing", self.fuse and not counted):
            seen = self.graphs.run(key, program, given, rehearse=True)
            return tree_map_only(Tensor, partial(of_first, group=self.graphs.group), seen)

    def lay_out(self, layout: Layout | None, call: dict[str, Any], tokens: Tensor) -> Layout | None:
        """Move prompts to the left of a bucket, in `call`, if the program can prefill them; returns their layout."""
        answer, (batch, length) = self.call.answer, tokens.shape[:2]
        assert answer
        mask = call.get("attention_mask")
        rows = torch.ones(batch, length).tolist() if mask is None else mask.tolist() if mask.dim() == 2 else []
        answer.fits = False
        if not layout or not any(layout) or tokens.dim() < 3 or call.get("position_ids") is None:
            return layout
        if not rows or not all(1 in row for row in rows):
            return layout
        first = [row.index(1) for row in rows]
        lengths = [int(sum(row)) for row in rows]
        kinds = {tuple((tuple(span[1]), *span[2:]) for span in spans) for spans in map(sorted, layout)}
        whole = all(all(row[at : at + size]) for row, at, size in zip(rows, first, lengths, strict=True))
        if len(kinds) > 1 or not whole:
            return layout
        answer.fits, answer.lengths = True, lengths
        most = -(-max(lengths) // BUCKET) * BUCKET
        at = torch.arange(most, device=tokens.device)
        bounds = torch.tensor([first, lengths], device=tokens.device)[..., None]
        index = (bounds[0] + at).clamp(max=length - 1)
        call |= reordered(call, tokens, index, at < bounds[1])
        return [
            [Span(_moved(span[0], -begin), *span[1:]) for span in spans]
            for spans, begin in zip(layout, first, strict=True)
        ]

    def run(self, stock: Callable[..., Any], *args: Any, **call: Any) -> Any:
        """The forward call of the decoder."""
        answer = self.call.answer
        if answer is None or self.call.reading is not None:
            return stock(*args, **call)
        assert answer.state
        if not answer.fits:
            output = stock(*args, **call)
            with _plain():
                self._adopt(output.past_key_values, answer)
            return output
        with _plain():
            hidden = self._run(call["inputs_embeds"], call["position_ids"], answer)
        return Hidden(hidden, call.get("past_key_values"))

    def _run(self, x: Tensor, positions: Tensor, answer: Answer) -> Tensor:
        state = answer.state
        assert state
        (group,), (batch, length) = state.groups, x.shape[:2]
        left = [group.whole, *(self.plan.kept(group.whole) if self.plan else ())]
        gone = group.whole - left[-1]
        answer.held = max(answer.lengths) - gone
        room = -(-max(length - gone, answer.held + min(answer.limit, LEG)) // ROOM) * ROOM
        answer.slots = slots = self._slots(batch, room)
        given = [x, positions, *state.varying()]
        key = ("prefill", room, group.grids, *((tensor.shape, tensor.dtype) for tensor in given))
        costs = self.meter.record.multiply_adds
        before = costs["scoring"]
        with self._fusing("prefilling", self.fuse):
            hidden, state.finite, numbers = self.graphs.run(
                key, partial(self._prefill, state, slots), given, rehearse=True
            )
        # A replayed graph counts nothing.
        costs["scoring"] = before + self.scoring.setdefault(key, costs["scoring"] - before)
        if self.plan:
            for layer, had, has, number in zip(self.plan.layers, left[:-1], left[1:], numbers, strict=True):
                state.stages.append(Stage(layer, batch * had, batch * has, tuple(number)))
                if has < had:
                    state.lengths.append(length - group.whole + has)
        a_token = slots.nbytes // (batch * slots.length)
        size = a_token * (sum(answer.lengths) - batch * gone) / batch
        self.meter.record.add_cache(self.close(state), answer.held, size)
        return hidden

    def _slots(self, batch: int, length: int) -> Slots:
        length = -(-length // ROOM) * ROOM
        slots = self.caches.get((batch, length))
        if slots is None:
            weight = self.weights[0].before
            slots = Slots(len(self.weights), self.shape, batch, length, weight)
            self.caches[batch, length] = slots
        return slots

    def _adopt(self, cache: Any, answer: Answer) -> None:
        """Take over what a prefill by the stock layers left in their cache."""
        state = answer.state
        assert state
        pruned = state.pruned()
        real = state.real if pruned is None else pruned.real
        held = real.sum(1)
        answer.held = int(held.max())
        answer.slots = slots = self._slots(len(real), answer.held + min(answer.limit, LEG))
        # What is real first, in order.
        order = (~real).sort(dim=1, stable=True).indices[:, None, : answer.held, None]
        for number in range(len(self.weights)):
            slots.fill(number, *(tensor.take_along_dim(order, 2) for tensor in kv.read(cache, number)))
        slots.slot.copy_(held)
        slots.position.copy_(state.position[:, 0])

    # The programs.

    def _prefill(self, start: Prefill, slots: Slots, x: Tensor, positions: Tensor, *varying: Tensor) -> Any:
        """All layers over prompts [B, L, C] that begin like `start`, with what varies between such prompts.

        Returns the last token's hidden state [B, 1, C], whether all scores were finite, and the visual tokens [B, K]
        left after each stage; fills the slots.
        """
        try:
            return self._layers(start.with_varying(varying), slots, x, positions)
        finally:
            # A capture that fails must not end with two streams, and memory goes back to the first one.
            self.beside.wait()

    def _layers(self, state: Prefill, slots: Slots, x: Tensor, positions: Tensor) -> Any:
        plan, beside = self.plan, self.beside
        stages = {layer: stage for stage, layer in enumerate(plan.layers)} if plan else {}
        whole = self.backbone.angles(self.decoder, positions)
        cos, sin = whole
        numbers: list[Tensor] = []
        made: list[tuple[int, Tensor, Tensor]] = []
        read: list[tuple[int, Tensor, Tensor]] = []
        if 0 in stages:
            x = self.prune(state, 0, x)
        for number, weights in enumerate(self.weights):
            if number in stages:
                numbers.append(state.groups[0].number)
                if state.index is not None:
                    cos, sin = (rows_of(table, state.index) for table in whole)
            if plan and number == plan.reference:
                state.reference = x
            stage = stages.get(number + 1)
            x, queries, keys, values = fused.prefill(x, cos, sin, weights, self.shape)
            made.append((number, keys, values))
            if stage is not None:
                x = self.prune(state, stage, x, partial(self._rows, queries, keys))
            if number < len(state.added):
                x = x + state.left(state.added[number]).to(x)
            all_known = plan is None or number + 1 >= plan.layers[-1]
            if all_known and (len(made) >= TOGETHER or number + 1 == len(self.weights)):
                beside.wait()
                read, made = made, []
                with beside.running():
                    self._fill(slots, state, read)
        ends, norm = state.ends(x.shape[1]), self.decoder.norm
        last = rows_of(x, ends)
        slots.slot.copy_(ends[:, 0] + 1)
        slots.position.copy_(state.position[:, 0])
        finite = state.finite & last.isfinite().all() if plan else state.finite
        return fused.norm(last, norm.weight, norm.variance_epsilon), finite, numbers

    def _fill(self, slots: Slots, state: Prefill, layers: Sequence[tuple[int, Tensor, Tensor]]) -> None:
        """Put what is left of the keys and values of some layers into their slots."""
        before = [sum(at <= number for at in state.dropped()) for number, _, _ in layers]
        places = {prunes: state.cache_places(prunes) for prunes in set(before)}
        for prunes, (number, keys, values) in zip(before, layers, strict=True):
            left = places[prunes]
            if left is None:
                slots.fill(number, keys, values)
            else:
                fused.fill(*slots.layers[number], keys, values, left)

    def _rows(self, queries: Tensor, keys: Tensor, rows: Tensor, of: Callable[[Tensor], Tensor]) -> Tensor:
        """See `Engine._attention`; the layers of the program need no mask."""
        return fused.rows(of(queries), of(keys), rows, self.shape)

    def _decode(self, slots: Slots) -> None:
        """One token more for each sample."""
        x = self.model.get_input_embeddings().forward(slots.token[:, None])
        cos, sin = self.backbone.angles(self.decoder, slots.position[:, None])
        at = torch.arange(slots.length, device=x.device)
        seen = at <= slots.slot[:, None]
        for weights, (keys, values) in zip(self.weights, slots.layers, strict=True):
            x = fused.decode(x, cos, sin, weights, self.shape, keys, values, slots.slot, seen)
        norm = self.decoder.norm
        logits = self.model.get_output_embeddings().forward(fused.norm(x[:, 0], norm.weight, norm.variance_epsilon))
        slots.put(of_first(logits.float().argmax(-1), self.graphs.group))

    @contextmanager
    def _fusing(self, what: str, wanted: bool) -> Iterator[None]:
        """Fuse what is run, if wanted and on a GPU, and tell of the first time of a kind, in which it is compiled."""
        wanted = wanted and self.graphs.device.type == "cuda"
        first, since = wanted and what not in self.told, time.perf_counter()
        if first:
            self.told.add(what)
            ranks.tell(f"fusing the model's layers for {what} ...")
        with fusing(wanted):
            yield
        if first:
            ranks.tell(f"fused the model's layers for {what}: {time.perf_counter() - since:.1f} s")


def _moved(start: int | Sequence[int], by: int) -> int | tuple[int, ...]:
    return tuple(each + by for each in start) if isinstance(start, Sequence) else start + by


@contextmanager
def _plain() -> Iterator[None]:
    """Make tensors that outlive the inference mode of a caller."""
    with torch.inference_mode(False), torch.no_grad():
        yield


@contextmanager
def _remembering(module: nn.Module, names: Sequence[str], known: dict[str, Any]) -> Iterator[None]:
    """Let methods of a module give what they gave before, since they ask the host."""

    def once(name: str, *args: Any) -> Any:
        if name not in known:
            known[name] = getattr(type(module), name)(module, *args)
        return known[name]

    for name in names:
        setattr(module, name, partial(once, name))
    try:
        yield
    finally:
        for name in names:
            delattr(module, name)
