"""The engine: hooks that prune a stock decoder during its prefill.

It joins a backbone and a strategy and names neither. Every count is known before the first layer runs,
so nothing inside the layer loop waits for the device.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from strategy import cache as kv
from strategy import fused, registry
from strategy.attention import attention_rows, paid_to, rows_of
from strategy.backbone import Backbone, Layout, find_backbone
from strategy.base import Plan, View
from strategy.call import Call
from strategy.config import VTRConfig
from strategy.fast import Fast
from strategy.fusing import fused_between
from strategy.meter import Meter
from strategy.parallel import heads_of_all, of_first
from strategy.prefill import Group, Prefill, Pruned, checked
from strategy.prior import EnoughError, question_free
from strategy.record import RunRecord, Stage
from strategy.selecting import highest, sound

# Where an attached model and its decoder keep their engine, so that it lives as long as they do.
ATTRIBUTE = "_pruning_engine"
# Where a cache keeps what it no longer shows of its prompt, so that its copies keep it too.
PRUNED = "_pruned_prompt"
INPUTS = ("input_ids", "inputs_embeds")  # what the tokens of a call are given as, one or the other
Watch = Callable[[View, Tensor, Tensor], None]
Rows = Callable[[Tensor, Callable[[Tensor], Tensor]], Tensor]  # attention of tokens, of some samples


def attach(
    model: nn.Module,
    config: VTRConfig,
    backbone: str | None = None,
    layout: Layout | None = None,
    watch: Watch | None = None,
) -> RunRecord:
    """Put the hooks on a model and return the record they will write.

    model: a model of a known backbone; or its bare text decoder, with `layout`, for each sample a list of
    (start, (T, H, W)), see `Span`, and with `backbone` where the decoder's class serves several. watch: called
    at each stage for each group of samples alike, with their view, their scores [G, N] and the tokens kept
    [G, K]; what it does is not counted. Raises ValueError for an unknown model, a configuration that does not
    fit the decoder, or a model that is attached already.
    """
    family = find_backbone(model, backbone)
    bare = isinstance(model, family.decoders)
    if bare and layout is None:
        raise ValueError(f"a bare {type(model).__name__} cannot tell where its visual tokens lie: give layout=")
    decoder = model if bare else family.decoder(model)
    if hasattr(decoder, ATTRIBUTE):
        raise ValueError(f"this {type(model).__name__} is being pruned already: detach it first")
    engine = Engine(model, decoder, family, config, layout, watch)
    for module in (model, decoder):
        setattr(module, ATTRIBUTE, engine)
    return engine.record


def detach(model: nn.Module) -> None:
    """Take the hooks off again; ValueError for a model that is not attached."""
    engine = getattr(model, ATTRIBUTE, None)
    if engine is None or engine.model is not model:
        raise ValueError(f"this {type(model).__name__} is not being pruned")
    engine.remove()


@contextmanager
def prune(
    model: nn.Module,
    config: VTRConfig,
    backbone: str | None = None,
    layout: Layout | None = None,
    watch: Watch | None = None,
) -> Iterator[RunRecord]:
    """Prune a model inside a `with`; arguments and errors are those of `attach`."""
    record = attach(model, config, backbone, layout, watch)
    try:
        yield record
    finally:
        detach(model)


class Engine:
    """The hooks on one model, and the record they write."""

    def __init__(
        self,
        model: nn.Module,
        decoder: Any,
        backbone: Backbone,
        config: VTRConfig,
        layout: Layout | None,
        watch: Watch | None,
    ) -> None:
        self.model, self.decoder, self.backbone, self.fixed_layout = model, decoder, backbone, layout
        self.watch, self.group = watch, fused.group_of(decoder.layers)
        self.strategy = registry.get(config.strategy)(config) if config.enabled else None
        self.plan: Plan | None = None
        if self.strategy:
            self.plan = self.strategy.plan(backbone.facts(decoder))
            if not isinstance(self.plan, Plan):
                raise ValueError(
                    f"{config.strategy}: plan() returned {self.plan!r}, want a Plan, as `Plan.resolve` makes it"
                )
            if self.strategy.question_free and self.plan.layers[0] == 0:
                raise ValueError(
                    f"{config.strategy} reads prompts without their questions first: prune at layer 1 or later"
                )
        self.record = RunRecord(config.strategy if config.enabled else "unpruned", len(decoder.layers), self.plan)
        self.call = Call()
        self.meter = Meter(self.record, self.call, decoder.layers, backbone.experts(decoder))
        self.handles: list[RemovableHandle] = []
        entry = decoder if isinstance(model, backbone.decoders) else backbone.entry(model)
        self.handles.append(entry.register_forward_pre_hook(self._enter, with_kwargs=True))
        self.handles.append(decoder.register_forward_pre_hook(self._begin, with_kwargs=True))
        self.handles.append(decoder.register_forward_hook(self._end, with_kwargs=True, always_call=True))
        self.handles += backbone.extra_hooks(decoder)
        if model is not decoder:
            whole: Any = model
            self.handles += self.meter.hooks(backbone.vision(model), whole.get_output_embeddings())
        for number, layer in enumerate(decoder.layers):
            self.handles += self._layer_hooks(number, layer)
        self.handles.append(decoder.layers[-1].register_forward_hook(self._finish, with_kwargs=True))
        self.replaced: list[tuple[nn.Module, str, Any]] = []
        self.fast: Fast | None = None
        if config.engine != "eager" and model is not decoder and watch is None:
            self._make_fast(config.engine)

    def _make_fast(self, mode: str) -> None:
        """Put the fast path in the place of the forward calls it speeds up, and of the greedy loop."""
        unfit = fused.unfit(self.decoder.layers)
        if unfit and mode == "graph":
            self.remove()
            raise ValueError(f"engine=graph: {unfit} cannot be fused; allowed here are engine=eager and engine=auto")
        parts = (self.model, self.decoder, self.backbone, self.plan, mode, unfit)
        fast = Fast(*parts, self.call, self.meter, self._prune, self._close)
        for module in self.backbone.vision(self.model):
            stacks = [each for each in module.modules() if isinstance(each, nn.ModuleList)]
            for block in chain.from_iterable(stacks):
                self._replace(block, "forward", partial(fused_between, block.forward))
            self._replace(module, "forward", partial(fast.see, module, module.forward))
        self._replace(self.decoder, "forward", partial(fast.run, self.decoder.forward))
        for name, answer in self.backbone.greedy(self.model, fast.answer).items():
            self._replace(self.model, name, answer)
        self.fast = fast

    def _replace(self, module: nn.Module, name: str, value: Any) -> None:
        self.replaced.append((module, name, vars(module).get(name)))
        setattr(module, name, value)

    def _layer_hooks(self, number: int, layer: nn.Module) -> list[RemovableHandle]:
        handles: list[RemovableHandle] = []
        if self.plan and number == self.plan.reference:
            handles.append(layer.register_forward_pre_hook(self._keep_reference))
        if self.plan and number == self.plan.layers[0] == 0:
            handles.append(layer.register_forward_pre_hook(self._before_all, with_kwargs=True))
        if self.plan and number >= self.plan.layers[0]:
            handles.append(layer.register_forward_pre_hook(self._narrow, with_kwargs=True))
        if self.plan:
            stage = self.plan.layers.index(number + 1) if number + 1 in self.plan.layers else None
            # First, so that whoever records hidden states, as transformers 5 does by hooks, sees what is left.
            # A partial of a method, since a closure would stay this engine's in a copy of the model.
            after = partial(self._after, number, stage)
            handles.append(layer.register_forward_hook(after, with_kwargs=True, prepend=True))
        return handles

    def remove(self) -> None:
        """Take every hook off, and the engine with them."""
        self.meter.close()
        for handle in self.handles:
            handle.remove()
        for module, name, before in reversed(self.replaced):
            delattr(module, name) if before is None else setattr(module, name, before)
        for module in {self.model, self.decoder}:
            if hasattr(module, ATTRIBUTE):
                delattr(module, ATTRIBUTE)
        # Last, since it takes memory, which may not be there.
        if self.fast is not None:
            self.fast.free()

    # The hooks, in the order in which one forward call meets them.

    def _enter(self, module: nn.Module, args: tuple[Any, ...], call: dict[str, Any]) -> Any:
        """Read a new prompt's layout; place what follows a pruned one where it would stand without pruning."""
        if self.call.reading is not None:
            return None
        tokens, cache = _tokens(args, call), call.get("past_key_values")
        held = kv.length(cache)
        if not held:
            self.call.layout = (
                self.backbone.layout(self.model, call) if self.fixed_layout is None else self.fixed_layout
            )
            if self.strategy and self.strategy.question_free:
                self.call.closing = None if self.fixed_layout else self.backbone.closing(self.model, call)
            return None
        prompt = self._prompt_of(cache, tokens)
        if prompt is None:
            return None
        mask, new, before = call.get("attention_mask"), tokens.shape[1], held - prompt.real.shape[1]
        # By hand nobody gives these; `generate` does, and its positions count wrong on a pruned cache.
        generating = call.get("cache_position") is not None
        later = torch.arange(before + new, device=tokens.device)[None]
        if mask is not None and mask.dim() == 2:
            gone = prompt.prompt - prompt.real.shape[1]
            if generating and mask.shape[1] == held + new and gone < new:
                # `generate` hands over all that the cache does not hold, not knowing that some of it was pruned.
                new -= gone
                call |= {name: call[name][:, -new:] for name in INPUTS if call.get(name) is not None}
            later = mask[:, prompt.prompt :].long().cumsum(1) - 1
        if generating or call.get("position_ids") is None:
            call["position_ids"] = prompt.position + later[:, -new:].clamp(min=0)
        return args, call

    def _prompt_of(self, cache: Any, tokens: Tensor) -> Pruned | None:
        """The pruned prompt in a cache that now holds as many samples as there are rows of tokens."""
        prompt: Pruned | None = getattr(cache, PRUNED, None)
        return prompt and prompt.fit(len(tokens), tokens.device)

    def _begin(self, module: nn.Module, args: tuple[Any, ...], call: dict[str, Any]) -> Any:
        tokens, cache = _tokens(args, call), call.get("past_key_values")
        if self.call.reading is not None:  # a prompt without its question
            return args, call
        # An interrupt from the keyboard may have left them.
        self.call.prefill = self.call.prior = None
        self.call.since = self.record.clock.start(tokens.device)
        if kv.length(cache):
            self.call.part = self.call.part and "decode"
            return self._continue(args, call, cache, tokens)
        self.call.part = None
        if hasattr(cache, PRUNED):  # emptied to be used again
            delattr(cache, PRUNED)
        layout, self.call.layout = self.call.layout, None
        visual = layout is not None and any(layout)
        if self.call.answer is not None and self.fast:
            layout = self.fast.lay_out(layout or [[]] * len(tokens), call, tokens)
            tokens = _tokens(args, call)
        if layout is not None and (visual or self.call.answer):
            state = Prefill.start(layout, tokens, call.get("attention_mask"), call.get("position_ids"))
            if self.call.answer is not None:
                self.call.answer.state = state
        if visual and layout is not None:
            if self.strategy and self.strategy.question_free:
                self._read_question_free(call, layout, tokens, state.last)
                state.prior, self.call.prior = self.call.prior, None
            self.call.prefill, self.call.part = state, "prefill"
            if self.plan or (self.call.answer and self.call.answer.fits):
                state.added = self.backbone.added(call)
        return args, call

    def _continue(self, args: tuple[Any, ...], call: dict[str, Any], cache: Any, tokens: Tensor) -> Any:
        """Fit a later call's mask, as long as the whole prompt and all that follows it, to a pruned cache."""
        prompt = self._prompt_of(cache, tokens)
        if prompt is None:
            return None
        held, new, real = kv.length(cache), tokens.shape[1], prompt.real
        mask, later = call.get("attention_mask"), held + new - real.shape[1]
        if mask is None:
            mask = real.new_ones(len(real), later)
        elif mask.dim() == 2 and mask.shape[1] != prompt.prompt + later:
            raise ValueError(
                f"attention_mask is for {mask.shape[1]} tokens, but the prompt had {prompt.prompt} and {later} follow "
                "it: a call on a pruned cache takes the mask of all of them, and only the new tokens as its input"
            )
        if mask.dim() == 2:
            call["attention_mask"] = torch.cat([real.to(mask.dtype), mask[:, -later:]], dim=1)
        if call.get("cache_position") is not None:
            call["cache_position"] = torch.arange(held, held + new, device=tokens.device)
        return args, call

    def _read_question_free(self, call: dict[str, Any], layout: Layout, tokens: Tensor, last: Tensor) -> None:
        """Run the first layers over the prompts without their questions, for the attention of their last tokens."""
        assert self.plan
        mask = call.get("attention_mask")
        if mask is not None and mask.dim() != 2:
            raise ValueError(
                f"{self.record.strategy} needs an attention_mask [B, S], not one of {mask.dim()} dimensions"
            )
        (batch, length), since = tokens.shape[:2], self.record.clock.start(tokens.device)
        frames, closing = checked(layout, batch, length), self.call.closing or [0] * batch
        short, self.call.reading = question_free(call, tokens, frames, closing, last[:, 0].tolist())
        try:
            with torch.no_grad(), suppress(EnoughError):
                self.decoder(**short)
        finally:
            self.call.reading, self.call.closing = None, None
        self.meter.prefill(batch, [short["attention_mask"].shape[1]] * self.plan.layers[0], part="scoring")
        self.record.clock.stop("scoring", since)

    def _keep_reference(self, layer: nn.Module, args: tuple[Any, ...]) -> None:
        if self.call.prefill is not None:
            self.call.prefill.reference = args[0]

    def _narrow(self, layer: nn.Module, args: tuple[Any, ...], call: dict[str, Any]) -> Any:
        state = self.call.prefill
        if state is None or state.index is None:
            return None
        mask_4d = "flash" not in self.decoder.config._attn_implementation
        for name in ("attention_mask", "position_ids", "position_embeddings", "cache_position"):
            if name in call:
                call[name] = state.narrow(name, call[name], mask_4d)
        return args, call

    def _before_all(self, layer: nn.Module, args: tuple[Any, ...], call: dict[str, Any]) -> Any:
        """Prune what enters the first layer."""
        state = self.call.prefill
        if state is None:
            return None
        with torch.no_grad():
            return (self._prune(state, 0, args[0]), *args[1:]), call

    def _after(
        self,
        number: int,
        stage: int | None,
        layer: nn.Module,
        args: tuple[Any, ...],
        call: dict[str, Any],
        output: Any,
    ) -> Any:
        """Prune behind a layer, if that is a stage, and then add what the stock loop would add."""
        state = self.call.prefill
        if stage == 0 and self.call.reading is not None:
            with torch.no_grad(), self.meter.scoring("question-free", args[0].shape):
                self.call.prior = self._attention(number, args[0], call, self.call.reading)[:, :, 0]
            if fused.sharded(self.decoder.layers):
                return None  # the other processes gather the layers that follow, too
            raise EnoughError
        if state is None:
            return None
        hidden, *others = output if isinstance(output, tuple) else (output,)
        if stage is not None:
            state.move(hidden.device)
            state.projects = _cache_of(call) is None
            with torch.no_grad():
                hidden = self._prune(state, stage, hidden, partial(self._attention, number, args[0], call))
        if number < len(state.added):
            hidden = hidden + state.left(state.added[number]).to(hidden)
        return (hidden, *others) if isinstance(output, tuple) else hidden

    def _prune(self, state: Prefill, stage: int, hidden: Tensor, rows: Rows | None = None) -> Tensor:
        """Score, select, merge and drop hidden states [B, L, C], those behind a layer with the attention `rows`."""
        assert self.strategy
        assert self.plan
        since = self.record.clock.start(hidden.device)
        seen = sum(group.number.numel() for group in state.groups)
        stays = []
        for group in state.groups:
            kept = self.plan.kept(group.whole)[stage]
            first = hidden.shape[1] - group.left.shape[1]
            if kept < group.number.shape[1]:
                view = self._view(state, group, stage, kept, hidden, rows)
                shapes = (group.grids, view.visual.shape, view.question.shape, hidden.shape[1:])
                with self.meter.scoring(stage, kept, state.projects, *shapes):
                    scores = self._shaped("score", self.strategy.score(view), view.visual.shape)
                    scores = of_first(scores, self.group)
                    chosen = highest(scores, kept)
                    weights = self.strategy.merge(view, chosen)
                    if weights is not None:
                        weights = self._shaped("merge", weights, (*chosen.shape, view.visual.shape[1]))
                        weights = of_first(weights, self.group)
                        merged = (weights @ view.features.float()).to(hidden.dtype)
                        places = view.visual.gather(1, chosen)
                        hidden = hidden.index_put((group.rows[:, None].expand_as(places), places), merged)
                # Later what is not finite shows in the scores, or at the end.
                state.finite = state.finite & sound(scores, None if stage else view.features)
                if self.watch:
                    self.record.clock.stop("scoring", since)
                    self.watch(view, scores, chosen)
                    since = self.record.clock.start(hidden.device)
                stay = group.keep(chosen)
            else:
                stay = torch.arange(group.left.shape[1], device=hidden.device).expand(len(group.samples), -1)
            stays.append(stay + first if first else stay)
        left = sum(group.number.numel() for group in state.groups)
        state.stages.append(Stage(self.plan.layers[stage], seen, left, state.kept()))
        hidden = state.drop(stays, hidden) if left < seen else hidden
        self.record.clock.stop("scoring", since)
        return hidden

    def _shaped(self, method: str, given: Any, shape: Sequence[int]) -> Tensor:
        """What a strategy's method returned, in float32, if it has the shape that is wanted; ValueError if not."""
        found = list(given.shape) if isinstance(given, Tensor) else type(given).__name__
        if found != list(shape):
            raise ValueError(f"{self.record.strategy}: {method}() returned {found}, want a tensor {list(shape)}")
        return given.float()

    def _view(
        self,
        state: Prefill,
        group: Group,
        stage: int,
        keep: int,
        hidden: Tensor,
        rows_at: Rows | None,
    ) -> View:
        offset = hidden.shape[1] - group.left.shape[1]

        def moved(places: Tensor) -> Tensor:
            return places + offset if offset else places

        visual = moved(group.visual)

        def attention(rows: Tensor) -> Tensor:
            if rows_at is None:
                raise ValueError(f"{self.record.strategy} asks for attention, which nothing pays before layer 0")
            weights = rows_at(rows, lambda x: state.of(group, x.to(hidden.device)))
            return heads_of_all(paid_to(weights, visual), self.group)

        def reference_at(rows: Tensor) -> Tensor:
            if state.reference is None:
                raise ValueError(f"{self.record.strategy} asks for a reference, but its plan names no reference layer")
            return rows_of(state.of(group, state.reference), group.left.gather(1, rows - offset))

        prior = None
        if state.prior is not None:
            # Up to the last visual token both prompts are the same.
            places = group.left.gather(1, group.visual)
            prior = state.of(group, state.prior)
            prior = prior.gather(2, places[:, None].expand(-1, prior.shape[1], -1))
            prior = heads_of_all(prior, self.group)
        return View(
            stage=stage,
            samples=tuple(group.samples),
            keep=keep,
            grids=group.grids,
            on_grid=group.on_grid,
            visual=visual,
            last=state.of(group, state.ends(hidden.shape[1])),
            question=moved(group.text[:, -group.asked.shape[1] :]),
            asked=group.asked,
            features_at=lambda rows: rows_of(state.of(group, hidden), rows),
            reference_at=reference_at,
            attention=attention,
            prior=prior,
            memo=group.memo,
        )

    def _attention(
        self,
        number: int,
        before: Tensor,
        call: dict[str, Any],
        rows: Tensor,
        of: Callable[[Tensor], Tensor] = lambda tensor: tensor,
    ) -> Tensor:
        """Attention [G, heads, R, L] of the tokens at `rows`, of a layer whose input is `before` [B, L, C].

        of: picks the samples meant out of [B or 1, ...].
        """
        layer, cache = self.decoder.layers[number], _cache_of(call)
        keys = None if cache is None else of(kv.read(cache, number)[0])
        # Where layers lie on several devices, a layer's arguments may come from that of another.
        cos, sin = (of(table.to(before.device)) for table in self.backbone.rotary(layer, call))
        mask = call.get("attention_mask")
        mask = None if mask is None else of(mask.to(before.device))
        return attention_rows(layer, of(before), rows, (cos, sin), keys, mask)

    def _finish(self, layer: nn.Module, args: tuple[Any, ...], call: dict[str, Any], output: Any) -> None:
        """Trim the cache of every layer to what is left at the end, and close the record."""
        state, cache = self.call.prefill, _cache_of(call)
        if state is None:
            return
        if self.plan:
            hidden = output[0] if isinstance(output, tuple) else output
            state.move(hidden.device)
            state.finite = state.finite & rows_of(hidden, state.ends(hidden.shape[1])).isfinite().all()
        prompts, dropped = self._close(state), state.dropped()
        if cache is None:
            return
        size = 0
        for number in range(len(self.decoder.layers)):
            keys, values = kv.read(cache, number)
            places = state.cache_places(sum(at <= number for at in dropped))
            if places is not None:
                places = places.to(keys.device)
                keys, values = (tensor.take_along_dim(places[:, None, :, None], 2) for tensor in (keys, values))
                kv.write(cache, number, keys, values)
            size += keys.nbytes + values.nbytes
        self.record.add_cache(prompts, kv.length(cache), size / len(state.real))
        if (pruned := state.pruned()) is not None:
            setattr(cache, PRUNED, pruned)

    def _close(self, state: Prefill) -> int:
        """Write a finished prefill into the record; returns how many of its samples have visual tokens."""
        if not state.finite:
            raise ValueError(
                "the features of visual tokens or of what follows them are not finite, or scores of "
                f"{self.record.strategy} are NaN: look at the pictures, the weights and its knobs, or compute in "
                "bfloat16 or float32, which overflow later than float16"
            )
        visual = [group.whole for group in state.groups for _ in group.samples if group.whole]
        self.record.add_stages(len(state.real), visual, state.stages)
        dropped = state.dropped()
        depth = len(self.decoder.layers)
        self.meter.prefill(len(state.real), [state.length(sum(at <= n for at in dropped)) for n in range(depth)])
        return len(visual)

    def _end(self, module: nn.Module, args: tuple[Any, ...], call: dict[str, Any], output: Any) -> None:
        if self.call.reading is not None:
            return
        state, self.call.prefill, self.call.prior = self.call.prefill, None, None
        if output is None or self.call.part is None:  # it failed, or is no part of a prompt with visual tokens
            return
        self.record.clock.stop(self.call.part, self.call.since)
        if state is None:
            batch, new = output[0].shape[:2]
            self.meter.decoded(batch, new, kv.length(call["past_key_values"]))


def _tokens(args: tuple[Any, ...], call: dict[str, Any]) -> Tensor:
    """What the tokens of a call are given as, [B, L, C] or [B, L]."""
    if args:
        raise ValueError("while it is pruned, a decoder takes keyword arguments only, such as inputs_embeds=")
    embeddings = call.get("inputs_embeds")
    return call["input_ids"] if embeddings is None else embeddings


def _cache_of(call: dict[str, Any]) -> Any:
    """The cache among a layer's keyword arguments, whose name changed in transformers 4.56."""
    return call.get("past_key_values", call.get("past_key_value"))
