"""Whether a decoder's layers compute what their descriptions say, tried once on a few random tokens."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from strategy.kernels import kv_cache, llama_layer
from strategy.kernels.attention import project_keys
from strategy.kernels.layer_facts import tp_group_of
from strategy.kernels.layer_spec import MISDESCRIBED, LayerSpec, norm_epsilon

TOKENS = 8
# A token's features are small, so that what a layer adds and the epsilon of its norms show beside them; by token.
SMALLEST, LARGEST = -3.0, -1.0  # powers of ten
HOOKS = ("_forward_hooks", "_forward_pre_hooks")


class Family(Protocol):
    """What is needed of a `Backbone`, which documents the methods."""

    def rotary(self, layer: nn.Module, kwargs: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
        """Return what rotates the tokens of a layer's forward call."""

    def rotary_at(self, decoder: Any, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Return what rotates tokens at positions."""

    def extra_hooks(self, decoder: nn.Module) -> list[RemovableHandle]:
        """Register the hooks that the family needs."""


class Trial(NamedTuple):
    """What a trial of a decoder's layers showed.

    specs: The descriptions, with the attention `MISDESCRIBED` where a layer's keys are not those of its description.
    blocker: Why fused layers must not stand in for the stock ones; None if they may.
    """

    specs: tuple[LayerSpec, ...]
    blocker: str | None = None


class KeyRecorder:
    """Stands in for the cache of one layer, and keeps the keys and values [B, key heads, L, width] it is given."""

    def __init__(self) -> None:
        self.stored: tuple[Tensor, Tensor] | None = None

    def update(self, keys: Tensor, values: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Keep keys and values, and return them."""
        self.stored = keys, values
        return keys, values

    def get_seq_length(self, *_: Any) -> int:
        """Return how many tokens came before: none."""
        return 0

    get_usable_length = get_seq_length


class LayerCall(NamedTuple):
    """A stock layer's call: its keyword arguments, its output, and the keys and values it caches, None without any."""

    kwargs: dict[str, Any]
    output: Tensor
    stored: tuple[Tensor, Tensor] | None


def try_layers(decoder: Any, specs: Sequence[LayerSpec], family: Family, fused: bool) -> Trial:
    """Run one layer of each kind on a few random tokens, and compare it with its description.

    Nothing is left on the decoder, hooks do not see the trial, and the global random numbers stay as they are. Layers
    whose weights are not all on one device, or are split over processes, are not tried.

    Args:
        decoder: The decoder.
        specs: Descriptions of its layers.
        family: Its backbone.
        fused: Whether to compare the fused layers too.
    """
    layers = decoder.layers
    if llama_layer.unreachable_weights(layers) or tp_group_of(layers) is not None:
        return Trial(tuple(specs))
    kinds = _kinds(layers, specs)
    first = {kind: number for number, kind in reversed(list(enumerate(kinds)))}
    wrong: set[Hashable] = set()
    blocker = None
    try:
        with torch.no_grad(), _undisturbed(decoder), ExitStack() as hooks:
            for handle in family.extra_hooks(decoder):
                hooks.callback(handle.remove)
            stock = _StockRun(decoder, specs, family, set(first.values()))
            wrong = {kinds[number] for number in stock.calls if stock.has_other_keys(number)}
            blocker = stock.fused_difference() if fused else None
    except Exception as error:  # decoders are of all kinds, and whatever they raise is the reason
        first_line = next(iter(str(error).splitlines()), "")
        blocker = f"a {type(decoder).__name__} (trying its layers raised {type(error).__name__}: {first_line})"
    told = [replace(spec, attention=MISDESCRIBED) if k in wrong else spec for k, spec in zip(kinds, specs, strict=True)]
    return Trial(tuple(told), blocker if fused else None)


def _kinds(layers: nn.ModuleList, specs: Sequence[LayerSpec]) -> list[Hashable]:
    """Return for each layer what layers that compute alike share: description, modules, and their plain values."""
    plain = [
        {
            (path, name): value
            for path, module in layer.named_modules()
            for name, value in (*vars(module).items(), ("class", type(module).__qualname__))
            if isinstance(value, bool | int | float | str)
        }
        for layer in layers
    ]
    # A value that numbers the layers tells nothing. Of two layers, one value may be 0 and 1 by chance.
    numbers = {
        key
        for key in plain[0]
        if len(layers) > 2 and all(type(own.get(key)) is int and own[key] == n for n, own in enumerate(plain))
    }
    return [
        (spec, frozenset((key, type(value), value) for key, value in own.items() if key not in numbers))
        for spec, own in zip(specs, plain, strict=True)
    ]


@contextmanager
def _undisturbed(decoder: nn.Module) -> Iterator[None]:
    """Leave out the hooks of a decoder's modules and their training mode."""
    modules = list(decoder.modules())
    before = [{name: vars(module)[name] for name in (*HOOKS, "training")} for module in modules]
    try:
        for module in modules:
            vars(module).update({name: OrderedDict() for name in HOOKS}, training=False)
        yield
    finally:
        for module, own in zip(modules, before, strict=True):
            vars(module).update(own)


class _StockRun:
    """A decoder's forward call in which each layer is given the same random tokens, and only some layers run.

    Args:
        decoder: The decoder.
        specs: Descriptions of its layers.
        family: Its backbone.
        chosen: The layers that run, the first one among them.

    Attributes:
        calls: What these layers computed.
    """

    def __init__(self, decoder: Any, specs: Sequence[LayerSpec], family: Family, chosen: set[int]) -> None:
        self.decoder, self.specs, self.family, self.chosen = decoder, specs, family, chosen
        like, width = next(decoder.layers.parameters()), len(decoder.norm.weight)
        count = min([TOKENS, *(spec.window for spec in specs if spec.window is not None)])
        generator = torch.Generator().manual_seed(0)
        hidden = torch.randn(1, count, width, generator=generator, device="cpu")
        self.hidden = (hidden * torch.logspace(SMALLEST, LARGEST, count, device="cpu")[:, None]).to(like)
        self.positions = torch.arange(count, device=like.device)[None]
        self.calls: dict[int, LayerCall] = {}
        self.changed = False
        with ExitStack() as stack:
            for number, layer in enumerate(decoder.layers):
                stack.enter_context(_replaced(layer, partial(self._forward, number, layer.forward)))
            output = decoder(
                inputs_embeds=self.hidden,
                position_ids=self.positions,
                use_cache=False,
                output_attentions=False,
                output_hidden_states=False,
            )
        self.final = output[0]

    def _forward(self, number: int, stock: Callable[..., Any], hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Replace the forward call of a layer."""
        self.changed |= not torch.equal(hidden, self.hidden)
        if number in self.chosen:
            recorder = KeyRecorder()
            # What else a layer keeps than keys and values, it keeps in a cache of its own kind.
            names = kv_cache.NAMES if self.specs[number].has_rows else ()
            caches = {name: recorder for name in names if name in kwargs}
            output = stock(self.hidden, *args, **kwargs | caches)
            own, *self.others = output if isinstance(output, tuple) else (output,)
            self.in_tuple = isinstance(output, tuple)
            self.calls[number] = LayerCall(kwargs, own, recorder.stored)
        return (self.hidden, *self.others) if self.in_tuple else self.hidden

    def has_other_keys(self, number: int) -> bool:
        """Return whether a layer caches other keys than its description says."""
        layer, spec, call = self.decoder.layers[number], self.specs[number], self.calls[number]
        if call.stored is None or not spec.has_rows:
            return False
        try:
            keys = project_keys(layer, spec, self.hidden, self.family.rotary(layer, call.kwargs))
        except Exception:  # whatever the projections or the rotary raise, attention rows would raise too
            return True
        return not _close(keys, call.stored[0])

    def fused_difference(self) -> str | None:
        """Return where fused layers compute other numbers than the stock ones; None if they compute the same."""
        decoder, norm = self.decoder, self.decoder.norm
        tables = self.family.rotary_at(decoder, self.positions)
        for number, call in self.calls.items():
            layer, spec = decoder.layers[number], self.specs[number]
            weights, shape = llama_layer.layer_weights(layer, spec), llama_layer.layer_shape(layer, spec)
            output, _, *stored = llama_layer.prefill(self.hidden, *tables, weights, shape)
            pairs = [(output, call.output), *zip(stored, call.stored or (), strict=False)]
            if not all(_close(own, stock) for own, stock in pairs):
                return f"a {type(layer).__name__} (the fused layer computes other numbers than the stock layer)"
        name, window = type(decoder).__name__, getattr(decoder.config, "sliding_window", None)
        if self.changed:
            return f"a {name} (it changes hidden states between its layers or in front of them)"
        if not _close(llama_layer.rms_norm(self.hidden, norm.weight, norm_epsilon(norm)), self.final):
            return f"a {name} (its final norm computes other numbers than the fused one)"
        if window is not None and all(spec.window is None for spec in self.specs):
            # So few tokens would not show it.
            return f"a {name} (its configuration has sliding_window={window}, which no layer_spec describes)"
        return None


@contextmanager
def _replaced(layer: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """Let a layer have another forward call."""
    before = vars(layer).get("forward")
    layer.forward = forward
    try:
        yield
    finally:
        if before is None:
            del layer.forward
        else:
            layer.forward = before


def _close(own: Tensor, stock: Tensor) -> bool:
    """Return whether tensors are equal up to rounding, row by row; where the stock layer overflows, all are."""
    if own.shape != stock.shape:
        return False
    size = stock.float().norm(dim=-1)
    error = (own.float() - stock.float()).norm(dim=-1)
    return bool(((error <= _tolerance(stock) * size) | ~size.isfinite()).all())


def _tolerance(like: Tensor) -> float:
    epsilon = torch.finfo(like.dtype).eps
    if like.dtype == torch.float32 and torch.get_float32_matmul_precision() != "highest":
        epsilon = torch.finfo(torch.bfloat16).eps  # that products may have then
    return max(1e-3, 8 * epsilon)
