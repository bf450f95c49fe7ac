"""A call of `generate`, as far as it decides about the forward calls inside it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial, update_wrapper
from typing import Any

from torch import nn

from strategy.kernels import kv_cache
from strategy.kernels.arguments import named_arguments
from strategy.metrics.thread_state import ThreadState
from strategy.pruning.patch import ModelPatch


class _Current(ThreadState):
    """The `generate` that a thread is in.

    active: Whether it is in one. full_sequence: Whether the prompts begin with what the given cache holds. samples: How
    many prompts were given; None if unknown. arguments: What the encoders were given. encoding: Whether one of them
    runs.
    """

    active: bool = False
    full_sequence: bool = False
    samples: int | None = None
    arguments: Mapping[str, Any] = {}
    encoding: bool = False


class GenerateCall:
    """Keeps what the encoders of pictures are given inside `generate`, where the entry is not given it any more.

    Args:
        methods: See `Backbone.encoder_methods`.
    """

    def __init__(self, methods: Sequence[str]) -> None:
        self.methods, self.current = methods, _Current()

    def install(self, patch: ModelPatch, model: nn.Module, entry: nn.Module) -> None:
        """Watch the encoders of an entry, and the `generate` of its model."""
        for name in self.methods:
            if callable(method := getattr(entry, name, None)):
                # transformers passes an encoder what its signature names.
                patch.replace(entry, name, update_wrapper(partial(self.encode, method), method))
        if self.methods and callable(generate := getattr(model, "generate", None)):
            patch.replace(model, "generate", partial(self.generate, generate))

    @property
    def active(self) -> bool:
        """Return whether this thread is inside `generate`, as far as that is watched."""
        return self.current.active

    @property
    def full_sequence(self) -> bool:
        """Return whether `generate` cuts its prompts by the length of the cache that it was given."""
        return self.current.full_sequence

    def generate(self, stock: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
        """Call `generate`."""
        ids = args[0] if args else next((kwargs[n] for n in ("inputs", "input_ids") if kwargs.get(n) is not None), None)
        tokens = kwargs.get("inputs_embeds") if ids is None else ids
        mask, before = kwargs.get("attention_mask"), dict(vars(self.current))
        self.current.active, self.current.arguments = True, {}
        self.current.samples = None if tokens is None else len(tokens)
        self.current.full_sequence = (
            ids is not None and kv_cache.find(kwargs) is not None and (mask is None or mask.shape[1] == ids.shape[1])
        )
        try:
            return stock(*args, **kwargs)
        finally:
            vars(self.current).clear()
            vars(self.current).update(before)

    def encode(self, stock: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Call an encoder, and keep its arguments; an encoder that it calls itself may give these other names."""
        current = self.current
        if current.encoding or not current.active:
            return stock(*args, **kwargs)
        given = named_arguments(stock, args) | kwargs
        current.arguments = {**current.arguments, **{n: value for n, value in given.items() if value is not None}}
        current.encoding = True
        try:
            return stock(*args, **kwargs)
        finally:
            current.encoding = False

    def restore(self, kwargs: Mapping[str, Any], rows: int) -> tuple[dict[str, Any], int]:
        """Return the arguments of the entry's call of new prompts, with those that only the encoders were given.

        Args:
            kwargs: The arguments that the entry was given.
            rows: How many prompts it was given.

        Returns:
            The arguments, for each prompt once; and how often each prompt stands there, as for beams, which the
            encoders do not see.
        """
        missing = {name: value for name, value in self.current.arguments.items() if kwargs.get(name) is None}
        copies = rows // self.current.samples if missing and self.current.samples else 1
        whole = dict(kwargs) | missing
        if copies > 1 and whole.get("input_ids") is not None:
            whole["input_ids"] = whole["input_ids"][::copies]
        return whole, copies
