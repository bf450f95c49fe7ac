"""Functions of tensors with their operations fused, where the fast path asks for that."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache, wraps
from typing import Any

import torch
from torch import Tensor

# The dimensions in which prompts, prunes and caches differ: [B, L], [B, L, C], [B, heads, L, width].
LENGTHS: dict[int, list[int]] = {1: [], 2: [1], 3: [1], 4: [2]}
RECOMPILES = 64  # kinds of layers and numbers of samples that one process may compile a function for
_fusing: ContextVar[bool] = ContextVar("fusing", default=False)


@cache
def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function with its operations fused, for all lengths; torch keeps on disk what it compiles at first calls."""
    quick = torch.compile(function, fullgraph=True)

    def run(*args: Any, **call: Any) -> Any:
        for tensor in args:
            if isinstance(tensor, Tensor):
                torch._dynamo.maybe_mark_dynamic(tensor, LENGTHS[tensor.dim()])
        with torch._dynamo.config.patch(recompile_limit=RECOMPILES):
            return quick(*args, **call)

    return run


def fusable(function: Callable[..., Any]) -> Callable[..., Any]:
    """Let a function of tensors, without branches on their values, be fused inside of `fusing`."""

    @wraps(function)
    def run(*args: Any, **call: Any) -> Any:
        quick = not torch.compiler.is_compiling() and _fusing.get()
        return (compiled(function) if quick else function)(*args, **call)

    return run


@cache
def _compiled_between(function: Callable[..., Any]) -> Callable[..., Any]:
    return torch.compile(function)


def fused_between(method: Callable[..., Any], *args: Any, **call: Any) -> Any:
    """Call a method inside of which not all can be fused, and fuse what lies between, inside of `fusing`."""
    # Its class's function is what is kept compiled, since a method would keep its object.
    function = getattr(method, "__func__", None)
    if function is None or torch.compiler.is_compiling() or not _fusing.get():
        return method(*args, **call)
    with torch._dynamo.config.patch(recompile_limit=RECOMPILES):
        return _compiled_between(function)(method.__self__, *args, **call)  # type: ignore[attr-defined]


def is_fusing() -> bool:
    """Whether what is `fusable` is being fused."""
    return _fusing.get()


@contextmanager
def fusing(wanted: bool) -> Iterator[None]:
    """Fuse, if wanted, what is `fusable`."""
    token = _fusing.set(wanted)
    try:
        yield
    finally:
        _fusing.reset(token)
