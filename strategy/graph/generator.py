"""Greedy answers without host synchronisation between the tokens: fused layers, static caches, CUDA graphs.

The stock `generate` prepares an answer, and its loop makes the first token; meanwhile the decoder's forward call is one
program over all layers, which a graph replays where all pictures of a batch have one size. The tokens behind it come
from a further program.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from itertools import chain
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

from strategy.backbone import Backbone, GreedyRequest
from strategy.distributed.collectives import broadcast_first
from strategy.distributed.watchdog import HangWatchdog
from strategy.graph.batch_prefill import prefill_batch
from strategy.graph.bucketing import bucket_prompts
from strategy.graph.decoder import DECODE_CHUNK, FusedDecoder, GenerationState, plain_tensors
from strategy.graph.fallback import FallbackPolicy, recoverable_errors, wants_graphs
from strategy.graph.static_cache import StaticKVCache
from strategy.graph.vision import FLASH_REASON, VisionGraphs, attends_by_flash
from strategy.kernels import kv_cache
from strategy.kernels.compile import compile_between_breaks
from strategy.kernels.transfers import remembering
from strategy.metrics.thread_state import ThreadState
from strategy.pruning.hooks import PruningHooks
from strategy.pruning.patch import ModelPatch
from strategy.pruning.prompts import prompt_tokens

EOS_CHECK_LAG = 2  # decode steps that the host checks for the end of an answer behind the device


class DecoderOutput(dict[str, Any]):
    """The output of the decoder's forward call, which the stock model reads as it reads those of transformers."""

    def __init__(self, hidden: Tensor, caches: Mapping[str, Any]) -> None:
        super().__init__(last_hidden_state=hidden, **caches)

    def __getattr__(self, name: str) -> Any:
        return self.get(name)

    def __getitem__(self, name: Any) -> Any:
        return list(self.values())[name] if isinstance(name, int) else super().__getitem__(name)


class _Current(ThreadState):
    """generation: The answer that this thread makes; None while it makes none."""

    generation: GenerationState | None = None


class GraphGenerator:
    """Replaces the greedy loop of one attached model, and the forward calls of its parts while it answers.

    Args:
        model: The model.
        decoder: Its decoder.
        backbone: Its family.
        mode: `VTRConfig.engine`, auto or graph.
        blocker: Why the decoder's layers cannot be fused; None if they can.
        hooks: The hooks on the decoder, which begin and end each forward call.
    """

    def __init__(
        self, model: Any, decoder: Any, backbone: Backbone, mode: str, blocker: str | None, hooks: PruningHooks
    ) -> None:
        self.model, self.backbone, self.hooks, self.runner = model, backbone, hooks, hooks.runner
        self.record = self.runner.record
        self.policy = FallbackPolicy(model, decoder, mode, blocker, hooks.window, hooks.layer_hooks, self.record.decide)
        self.decoder = FusedDecoder(model, decoder, backbone, hooks.layer_hooks.specs, self.runner, self.policy)
        self.vision = VisionGraphs(self.decoder, self.policy, self.runner.meter, backbone.size_methods, hooks.encoder)
        self.current = _Current()

    def install(self, patch: ModelPatch) -> None:
        """Replace the forward calls of the vision modules and the decoder, and the greedy loop."""
        graphs, wanted = self.backbone.vision_graphs, wants_graphs(self.policy.mode, self.decoder.decoder)
        if not graphs and wanted:
            self.record.decide("vision", "stock modules", f"the backbone {self.backbone.name} wants no graphs of them")
        if graphs and wanted and not self.policy.unusable:
            self._replace_methods(patch)
        for module in self.backbone.vision(self.model) if graphs else ():
            if wanted and attends_by_flash(module):
                self.record.decide("vision", "stock modules", FLASH_REASON)
                continue
            stacks = [each for each in module.modules() if isinstance(each, nn.ModuleList)]
            seen = self.hooks.encoder and self.hooks.encoder.layer
            for block in chain.from_iterable(stacks):
                # What hooks record inside a compiled layer would be lost.
                if block is seen:
                    continue
                patch.replace(block, "forward", partial(compile_between_breaks, block.forward))
            patch.replace(module, "forward", partial(self.forward_vision, module, module.forward))
        decoder = self.decoder.decoder
        patch.replace(decoder, "forward", partial(self.forward_decoder, decoder.forward))
        loops = self.backbone.greedy_loop(self.model, self.generate)
        for name, loop in loops.items():
            patch.replace(self.model, name, loop)
        if not loops and wanted:
            self.policy.fall_back(f"the backbone {self.backbone.name} replaces no loop of generate (greedy_loop)")

    def _replace_methods(self, patch: ModelPatch) -> None:
        """Replace methods, see `Backbone.faster_methods`."""
        for module, name, function in self.backbone.faster_methods(self.model):
            # Somebody else, such as accelerate, may have replaced it.
            if name not in vars(module):
                # torch compiles methods of one function once.
                patch.replace(module, name, MethodType(function, module))

    def free(self) -> None:
        """Free graphs, caches and packed weights."""
        self.decoder.free()

    # The greedy loop.

    def generate(self, stock: Callable[[Any], Tensor], request: GreedyRequest) -> Tensor:
        """Return what the stock greedy loop returns: the prompts' token ids [B, S] and those of their answers.

        Args:
            stock: That loop, which takes the criteria that stop it.
            request: What is asked.
        """
        why = self.policy.reason(request)
        if why is not None:
            self.policy.fall_back(why)
            return stock(request.stopping_criteria)
        while True:
            with self.decoder.lock, remembering():
                before = self.record.snapshot()
                generation = self.current.generation = GenerationState(request.max_new_tokens or 1)
                try:
                    self.decoder.prepare()
                    return self._decode(stock(request.one_token_criteria()), request, generation)
                except recoverable_errors() as error:
                    failure = error
                except Exception:
                    self.record.restore(before)  # seconds of a refused prompt count, its operations do not
                    raise
                finally:
                    self.current.generation = None
                self.record.restore(before)
                self.free()
                self.policy.handle(failure)
                del failure  # it keeps what its frames hold
            if self.policy.unusable:
                return stock(request.stopping_criteria)

    def _decode(self, prompts: Tensor, request: GreedyRequest, generation: GenerationState) -> Tensor:
        """Continue prompts [B, S + 1] that end with the first token of their answers."""
        cache, rest = generation.cache, generation.max_new_tokens - 1
        meter, clock = self.runner.meter, self.record.clock
        with plain_tensors():
            if generation.finish is not None:
                generation.finish()  # only now, when the device makes the first token
                generation.finish = None  # it holds the states of the prompts
            prompts = broadcast_first(prompts, self.decoder.graphs.group)
            if cache is None or not rest:
                return prompts
            cache.begin(prompts[:, -1], request.eos_ids, request.pad_id or 0)
            chunks, held = [prompts], generation.cache_length
            since = clock.start(prompts.device)
            over = bool(cache.finished.all())
            while rest and not over:
                if held == cache.length:
                    longer = self.decoder.cache(len(prompts), held + min(rest, DECODE_CHUNK))
                    longer.copy_from(cache)
                    cache = longer
                steps, over = self._decode_chunk(cache, min(rest, cache.length - held))
                chunks.append(cache.tokens[:, :steps].clone())
                cache.step.zero_()
                rest, held = rest - steps, held + steps
        if meter.phase:
            clock.stop("decode", since)
            meter.decoded_stepwise(len(prompts), generation.cache_length, held)
        return torch.cat(chunks, dim=1)

    def _decode_chunk(self, cache: StaticKVCache, most: int) -> tuple[int, bool]:
        """Decode up to so many tokens a sample; return how many, and whether all samples are finished."""
        HangWatchdog.begin()
        on_gpu = cache.token.is_cuda
        stream = torch.cuda.current_stream(cache.token.device) if on_gpu else None  # of a card that need not be current
        flags = torch.zeros(most, dtype=torch.bool, device="cpu", pin_memory=on_gpu)
        events = [torch.cuda.Event() for _ in range(most)] if on_gpu else []
        decode_step = self.decoder.decode_step(cache)
        for step in range(most + EOS_CHECK_LAG):
            if step < most:
                decode_step()
                flags[step : step + 1].copy_(cache.all_finished, non_blocking=True)
                if on_gpu:
                    events[step].record(stream)
            checked = step - EOS_CHECK_LAG
            if checked >= 0:
                if on_gpu:
                    events[checked].synchronize()
                if flags[checked]:
                    return checked + 1, True
        return most, False

    # What replaces the forward calls of the model's parts.

    def bucket_prompts(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Move the prompts of an answer into a bucket; a hook on the decoder, before the one that begins its call."""
        generation = self.current.generation
        if generation is None or self.hooks.reading or kv_cache.length(kv_cache.find(kwargs)):
            return None
        tokens, context = prompt_tokens(args, kwargs), self.hooks.context
        layout = context.layout or [[]] * len(tokens)
        bucket = bucket_prompts(layout, kwargs, tokens)
        if isinstance(bucket, str):
            generation.graph_prefill, context.layout = False, layout
            self.record.decide("prefill", "stock prefill", bucket)
        else:
            generation.graph_prefill, context.layout, generation.lengths = True, bucket.layout, bucket.lengths
        return args, kwargs

    def forward_decoder(self, stock: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Return what the decoder's stock forward call returns."""
        generation, state = self.current.generation, self.hooks.context.prompt
        if generation is None or self.hooks.reading:
            return stock(*args, **kwargs)
        assert state
        if not generation.graph_prefill:
            output = stock(*args, **kwargs)
            with plain_tensors():
                self.decoder.import_cache(kv_cache.find(output), state, generation)
            return output
        with plain_tensors():
            # Without a plan, the hooks leave them to the stock loop.
            state.added = state.added or self.backbone.added_features(kwargs)
            hidden = prefill_batch(self.decoder, kwargs["inputs_embeds"], kwargs["position_ids"], state, generation)
        # The stock model reads the cache by the name under which it gave it.
        return DecoderOutput(hidden, {name: kwargs[name] for name in kv_cache.NAMES if name in kwargs})

    def forward_vision(self, module: nn.Module, stock: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Return what the stock forward call of a vision module returns."""
        if not self.vision.usable(module):
            return stock(*args, **kwargs)
        with self.decoder.lock:
            try:
                if self.current.generation is None:
                    self.decoder.prepare()
                return self.vision.forward(module, stock, *args, **kwargs)
            except recoverable_errors() as error:
                if self.current.generation is not None:
                    raise
                failure = error
            self.runner.meter.recount_vision()
            self.free()
            self.policy.handle(failure)
            del failure
        return self.forward_vision(module, stock, *args, **kwargs)
