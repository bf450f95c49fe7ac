"""Functions of tensors that are compiled where the graph engine asks for it."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache, wraps
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

# By number of dimensions, those in which prompts, prunes and caches differ: [B, L], [B, L, C], [B, heads, L, width].
DYNAMIC_DIMS: dict[int, list[int]] = {1: [], 2: [1], 3: [1], 4: [2]}
RECOMPILE_LIMIT = 64  # kinds of layers and numbers of samples that one process may compile a function for
_compiling: ContextVar[bool] = ContextVar("compiling", default=False)


@cache
def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return the compiled function, for all lengths; torch keeps on disk what the first calls compile."""
    compiled_function = torch.compile(function, fullgraph=True)

    def run(*args: Any, **kwargs: Any) -> Any:
        for tensor in args:
            if isinstance(tensor, Tensor):
                torch._dynamo.maybe_mark_dynamic(tensor, DYNAMIC_DIMS[tensor.dim()])
        with torch._dynamo.config.patch(recompile_limit=RECOMPILE_LIMIT):
            return compiled_function(*args, **kwargs)

    return run


def compilable(function: Callable[..., Any]) -> Callable[..., Any]:
    """Compile a function of tensors, without branches on their values, inside `compiling(True)`."""

    @wraps(function)
    def run(*args: Any, **kwargs: Any) -> Any:
        wanted = not torch.compiler.is_compiling() and _compiling.get()
        return (compiled(function) if wanted else function)(*args, **kwargs)

    return run


@cache
def _compiled_between(function: Callable[..., Any]) -> Callable[..., Any]:
    return torch.compile(function)


def compile_between_breaks(method: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Call a method that torch cannot compile as a whole, and compile what lies between, inside `compiling(True)`."""
    # The function of the class is cached, since a cached method would keep its object alive.
    function = getattr(method, "__func__", None)
    if function is None or torch.compiler.is_compiling() or not _compiling.get():
        return method(*args, **kwargs)
    for leaf in tree_leaves((args, kwargs)):
        if isinstance(leaf, Tensor) and leaf.dim() <= 2:  # a packed sequence [L, C], its tables and bounds
            torch._dynamo.maybe_mark_dynamic(leaf, 0)
    with torch._dynamo.config.patch(recompile_limit=RECOMPILE_LIMIT):
        return _compiled_between(function)(method.__self__, *args, **kwargs)  # type: ignore[attr-defined]


def is_compiling() -> bool:
    """Return whether `compilable` functions are compiled here."""
    return _compiling.get()


@contextmanager
def compiling(wanted: bool) -> Iterator[None]:
    """Compile `compilable` functions inside this `with`, if wanted."""
    token = _compiling.set(wanted)
    try:
        yield
    finally:
        _compiling.reset(token)
