"""Hooks that prune a stock decoder during its prefill.

The hooks join a backbone and a strategy and name neither. Every count is known before the first layer runs, so nothing
inside the layer loop waits for the device.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from strategy.backbone import Backbone, Layout
from strategy.kernels import kv_cache
from strategy.kernels.arguments import named_arguments
from strategy.kernels.layer_spec import LayerSpec
from strategy.kernels.transfers import read_early
from strategy.pruning import pruned_cache, refusals
from strategy.pruning.context import ForwardContext
from strategy.pruning.encoder import EncoderRecorder
from strategy.pruning.generate_call import GenerateCall
from strategy.pruning.joint import JointPlacer
from strategy.pruning.layer_hooks import LayerHooks
from strategy.pruning.patch import ModelPatch
from strategy.pruning.prompts import prompt_tokens
from strategy.pruning.question_free import QuestionFreePass
from strategy.pruning.stage import StageRunner
from strategy.pruning.state import PrefillState


class PruningHooks:
    """The hooks on one decoder, in the order in which a forward call reaches them.

    Args:
        model: The whole model, or the bare decoder.
        decoder: Its decoder.
        backbone: Their family.
        specs: Descriptions of the decoder's layers.
        layout: The layout of a bare decoder's prompts; None for a whole model, whose calls show it.
        runner: Runs the stages, and writes the record.
        question_free: Runs prompts without their questions, for strategies that want it.
        encoder: Records what the vision tower sees, for strategies that want it.
        joint: Places what the tower sees and the questions in a joint space, likewise.
    """

    def __init__(
        self,
        model: nn.Module,
        decoder: Any,
        backbone: Backbone,
        specs: Sequence[LayerSpec],
        layout: Layout | None,
        runner: StageRunner,
        question_free: QuestionFreePass | None,
        encoder: EncoderRecorder | None,
        joint: JointPlacer | None,
    ) -> None:
        self.model, self.decoder, self.backbone, self.fixed_layout = model, decoder, backbone, layout
        self.runner, self.plan, self.question_free = runner, runner.plan, question_free
        self.encoder, self.joint = encoder, joint
        self.context = ForwardContext()
        self.layer_hooks = LayerHooks(decoder, backbone, specs, self.context, runner, question_free)
        self.generate_call = GenerateCall(backbone.encoder_methods)
        self.window = min((spec.window for spec in specs if spec.window is not None), default=None)

    def register(self, patch: ModelPatch, entry: nn.Module, before_begin: Callable[..., Any] | None) -> None:
        """Put the hooks on.

        Args:
            patch: Where the handles go.
            entry: The module whose forward call shows the layout.
            before_begin: A further hook on the decoder, which may change a prompt and its layout.
        """
        patch.handles.append(entry.register_forward_pre_hook(self.read_layout, with_kwargs=True))
        if before_begin is not None:
            patch.handles.append(self.decoder.register_forward_pre_hook(before_begin, with_kwargs=True))
        patch.handles.append(self.decoder.register_forward_pre_hook(self.begin, with_kwargs=True))
        patch.handles.append(self.decoder.register_forward_hook(self.end, with_kwargs=True, always_call=True))
        self.layer_hooks.register(patch)
        if self.encoder is not None:
            self.encoder.register(patch)

    @property
    def reading(self) -> bool:
        """Return whether this forward call runs prompts without their questions."""
        return self.question_free is not None and self.question_free.active

    def read_layout(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Read a new prompt's layout; place what follows a pruned prompt where it would stand without pruning."""
        if self.reading:
            return None
        if module is not self.decoder:
            # Some models give the module that is their entry a part of its arguments by position.
            args, kwargs = (), named_arguments(module.forward, args) | kwargs
        tokens, cache = prompt_tokens(args, kwargs), kv_cache.find(kwargs)
        makes_masks = self.backbone.entry_makes_masks and module is not self.decoder
        mask = kwargs.get("attention_mask")
        self.context.padding = mask if makes_masks else None
        if not kv_cache.length(cache):
            if isinstance(mask, Tensor) and mask.dim() == 2:
                read_early(mask)
            fixed = self.fixed_layout
            self.context.layout = self._find_layout(kwargs, len(tokens)) if fixed is None else fixed
            if self.question_free is not None:
                template = None if fixed else self.backbone.num_template_tokens(self.model, kwargs)
                self.question_free.set_template(template)
            if self.joint is not None:
                self.joint.read(self.backbone.questions(self.model, kwargs))
            return args, kwargs
        prompt = pruned_cache.find_prompt(cache, tokens)
        if prompt is not None:
            pruned_cache.place_tokens(kwargs, cache, prompt, self.generate_call)
            if makes_masks:
                pruned_cache.fit_token_types(kwargs, cache)
                pruned_cache.fit_mask(kwargs, cache, prompt)
        self._count_unpruned(kwargs)
        return args, kwargs

    def _find_layout(self, kwargs: dict[str, Any], rows: int) -> Layout | None:
        """Return the layout of so many new prompts, given the arguments of the entry's forward call.

        Raises:
            ValueError: A prompt shows visual tokens for which there is no layout.
        """
        kwargs, copies = self.generate_call.restore(kwargs, rows)
        layout = self.backbone.layout(self.model, kwargs)
        shown, found = self.backbone.visual_samples(self.model, kwargs), sum(map(bool, layout or []))
        if shown > found:
            message = (
                f"{shown} of {rows // copies} prompts have placeholder tokens of pictures or videos, but pictures or "
                f"videos came with {found}, so that nothing is pruned in the others: give pixels and sizes as the "
                "processor returns them, to the same call as the token ids"
            )
            if self.plan is not None:
                raise ValueError(message)
            warnings.warn(message, stacklevel=2)
        return layout if layout is None else [spans for spans in layout for _ in range(copies)]

    def _count_unpruned(self, kwargs: dict[str, Any]) -> None:
        """Count the samples whose visual tokens follow a filled cache, and say once that these are not pruned."""
        # A single token is one of an answer, and nobody should wait for the device to look at it.
        if self.plan is None or self.fixed_layout is not None or prompt_tokens((), kwargs).shape[1] == 1:
            return
        record, count = self.runner.record, self.backbone.visual_samples(self.model, kwargs)
        if count and not record.unpruned_samples:
            warnings.warn(
                "visual tokens that follow a filled cache are not pruned: to prune them, give the whole prompt to one "
                "call, without a cache or with an empty one",
                stacklevel=2,
            )
        record.unpruned_samples += count

    def begin(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Begin the decoder's forward call: of a prompt with a new state, of later tokens with a mask that fits."""
        if self.reading:
            return args, kwargs
        tokens, cache, meter = prompt_tokens(args, kwargs), kv_cache.find(kwargs), self.runner.meter
        # A keyboard interrupt may have left them.
        self.context.prompt = self.context.pruned = None
        if self.question_free is not None:
            self.question_free.clear()
        if kv_cache.length(cache):
            meter.begin_decoder(meter.phase and "decode", tokens.device)
            prompt = pruned_cache.find_prompt(cache, tokens)
            if prompt is None:
                return None
            later = kv_cache.length(cache) + tokens.shape[1] - prompt.real.shape[1]
            self._check_window(prompt.length + later)
            if not isinstance(kwargs.get("attention_mask"), Mapping):  # the entry fitted what it made them of
                pruned_cache.fit_mask(kwargs, cache, prompt)
            return args, kwargs
        pruned_cache.forget(cache)
        layout, self.context.layout = self.context.layout, None
        visual = layout is not None and any(layout)
        if visual and self.plan:
            refusals.refuse_cache(cache)
        meter.begin_decoder("prefill" if visual else None, tokens.device)
        if layout is None:
            return args, kwargs
        mask, positions = kwargs.get("attention_mask"), kwargs.get("position_ids")
        # Masks that the entry made do not tell padding; one alone or one for each kind of layer.
        made = isinstance(mask, Mapping) or (mask is not None and mask.dim() == 4)
        padding = self.context.padding if made else mask
        state = self.context.prompt = PrefillState.from_layout(layout, tokens, padding, positions)
        if visual:
            if self.question_free is not None:
                state.prior = self.question_free.run(kwargs, layout, tokens, state.last)
            if self.encoder is not None:
                self.encoder.assign(state)
            if self.joint is not None:
                self.joint.assign(state)
            self.context.pruned = state
            if self.plan:
                # A cache with a window holds one token less than the window.
                self._check_window(tokens.shape[1], spare=1)
                state.added = self.backbone.added_features(kwargs)
        return args, kwargs

    def _check_window(self, length: int, spare: int = 0) -> None:
        """Raise ValueError if so many tokens, the pruned ones included, and `spare` are more than a layer's window."""
        if self.window is not None and length + spare > self.window:
            raise ValueError(
                f"prompt and answer have {length} tokens, but some layers see a window of {self.window}, and a prune "
                f"would change what lies in the window: allowed are prompts of fewer than {self.window} tokens, "
                f"{self.window} tokens with the answer, and enabled=False"
            )

    def end(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        """Count what the decoder's forward call took, and forget its state."""
        if self.reading:
            return
        state, self.context.pruned, self.context.prompt = self.context.pruned, None, None
        meter = self.runner.meter
        if output is None or meter.phase is None:  # the call failed, or belongs to no prompt with visual tokens
            return
        meter.end_decoder()
        if state is None:
            batch, new = output[0].shape[:2]
            meter.decoded(batch, new, kv_cache.length(kv_cache.find(kwargs)))
