"""Hooks on the layers of a stock decoder: they keep the reference, narrow arguments, prune and trim the cache."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from strategy.backbone import Backbone
from strategy.kernels import kv_cache
from strategy.kernels.attention import attention_rows, check_rows, gather_rows, project_keys
from strategy.kernels.layer_spec import LayerSpec
from strategy.pruning import pruned_cache
from strategy.pruning.context import ForwardContext
from strategy.pruning.patch import ModelPatch
from strategy.pruning.question_free import QuestionFreePass
from strategy.pruning.stage import LayerStates, StageRunner


class LayerHooks:
    """The hooks on a decoder's layers.

    Args:
        decoder: The decoder.
        backbone: Its family.
        specs: Descriptions of the decoder's layers.
        context: The forward call, which the hooks on the decoder itself begin and end.
        runner: Runs the stages, and writes the record.
        question_free: Runs prompts without their questions, for strategies that want it.
    """

    def __init__(
        self,
        decoder: Any,
        backbone: Backbone,
        specs: Sequence[LayerSpec],
        context: ForwardContext,
        runner: StageRunner,
        question_free: QuestionFreePass | None,
    ) -> None:
        self.decoder, self.backbone, self.specs, self.context = decoder, backbone, specs, context
        self.runner, self.plan, self.question_free = runner, runner.plan, question_free

    def register(self, patch: ModelPatch) -> None:
        """Put the hooks on."""
        for number, layer in enumerate(self.decoder.layers):
            self._register_on_layer(patch, number, layer)
        last = self.decoder.layers[-1]
        patch.handles.append(last.register_forward_hook(self.finish_prefill, with_kwargs=True))

    def _register_on_layer(self, patch: ModelPatch, number: int, layer: nn.Module) -> None:
        if not self.plan:
            return
        if number == self.plan.reference:
            patch.handles.append(layer.register_forward_pre_hook(self.keep_reference))
        if number == self.plan.layers[0] == 0:
            patch.handles.append(layer.register_forward_pre_hook(self.prune_input, with_kwargs=True))
        if number >= self.plan.layers[0]:
            narrow = partial(self.narrow, self.specs[number].linear)
            patch.handles.append(layer.register_forward_pre_hook(narrow, with_kwargs=True))
        stage = self.plan.layers.index(number + 1) if number + 1 in self.plan.layers else None
        # Not a hook, since transformers 4.57 records hidden states around the forward call and before all hooks, and
        # these shall be what is left. A partial of a method, since a closure would refer to these hooks in a copy of
        # the model, too.
        patch.replace(layer, "forward", partial(self.forward_layer, number, stage, layer.forward))

    def keep_reference(self, layer: nn.Module, args: tuple[Any, ...]) -> None:
        """Keep the input of the reference layer."""
        if self.context.pruned is not None:
            self.context.pruned.reference = args[0]

    def prune_input(self, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Prune what enters the first layer."""
        state = self.context.pruned
        if state is None:
            return None
        with torch.no_grad():
            return (self.runner.prune(state, 0, args[0]), *args[1:]), kwargs

    def narrow(self, linear: bool, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Narrow the keyword arguments of a layer, linear or not, to the tokens that are left."""
        state = self.context.pruned
        if state is None or state.layer_kwargs is None:
            return None
        mask_4d = not linear and "flash" not in self.decoder.config._attn_implementation
        state.layer_kwargs.narrow(kwargs, mask_4d)
        return args, kwargs

    def forward_layer(
        self, number: int, stage: int | None, stock: Callable[..., Any], *args: Any, **kwargs: Any
    ) -> Any:
        """Run a layer, prune behind it, if that is a stage, and then add what the stock loop would add."""
        output = stock(*args, **kwargs)
        hidden, *others = output if isinstance(output, tuple) else (output,)
        if stage == 0 and self.question_free is not None and self.question_free.active:
            # Where layers lie on several devices, a layer is given what lies on the device of the one before.
            before = args[0].to(hidden.device)
            with torch.no_grad(), self.runner.meter.scoring("question-free", before.shape):
                attention = self._attention(number, before, kwargs, self.question_free.last.to(before.device))
            self.question_free.capture(attention)
            return output
        state = self.context.pruned
        if state is None:
            return output
        if stage is not None:
            before = args[0].to(hidden.device)
            state.to_device(hidden.device)
            state.projects_keys = kv_cache.find(kwargs) is None
            with torch.no_grad():
                asked = number, before, kwargs
                states = LayerStates(before, partial(self._keys, *asked), partial(self._attention, *asked))
                hidden = self.runner.prune(state, stage, hidden, states)
        if number < len(state.added):
            hidden = hidden + state.remaining_rows(state.added[number]).to(hidden)
        return (hidden, *others) if isinstance(output, tuple) else hidden

    def _attention(
        self,
        number: int,
        before: Tensor,
        kwargs: dict[str, Any],
        query_positions: Tensor,
        select: Callable[[Tensor], Tensor] = lambda tensor: tensor,
    ) -> Tensor:
        """Return the attention [G, heads, R, L] of some tokens in a layer.

        Args:
            number: The layer.
            before: Its input [B, L, C].
            kwargs: Its keyword arguments.
            query_positions: Sequence indices [G, R] of the tokens.
            select: Picks the samples meant out of [B or 1, ...].
        """
        layer, spec, cache = self.decoder.layers[number], self.specs[number], kv_cache.find(kwargs)
        check_rows(layer, spec, self._stages())
        keys = None if cache is None else select(kv_cache.read(cache, number)[0])
        # Where layers lie on several devices, a layer's arguments may come from the device of another one.
        cos, sin = (select(table.to(before.device)) for table in self.backbone.rotary(layer, kwargs))
        mask = kwargs.get("attention_mask")
        mask = None if mask is None else select(mask.to(before.device))
        return attention_rows(layer, spec, select(before), query_positions, (cos, sin), keys, mask)

    def _keys(self, number: int, before: Tensor, kwargs: dict[str, Any]) -> Tensor:
        """Return the keys [B, key heads, L, head width] of a layer, given its input [B, L, C] and its arguments."""
        layer, spec, cache = self.decoder.layers[number], self.specs[number], kv_cache.find(kwargs)
        check_rows(layer, spec, self._stages())
        if cache is not None:
            return kv_cache.read(cache, number)[0]
        cos, sin = (table.to(before.device) for table in self.backbone.rotary(layer, kwargs))
        return project_keys(layer, spec, before, (cos, sin))

    def _stages(self) -> list[int]:
        """Return the layers to prune at for strategies that ask for attention or keys."""
        return [at + 1 for at, spec in enumerate(self.specs[:-1]) if spec.has_rows]

    def finish_prefill(self, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        """Trim the cache of every layer to what is left at the end, and write the record."""
        state, cache = self.context.pruned, kv_cache.find(kwargs)
        if state is None:
            return
        if self.plan:
            hidden = output[0] if isinstance(output, tuple) else output
            state.to_device(hidden.device)
            last = gather_rows(hidden, state.last_positions(hidden.shape[1]))
            state.finite = state.finite & last.isfinite().all()
        samples = self.runner.finish([state], state.stages)
        if cache is not None:
            size = pruned_cache.trim(cache, len(self.decoder.layers), state)
            self.runner.record.add_cache(samples, kv_cache.length(cache), size)
