"""The one list of strategies: configuration, command lines, docs and tests read it."""

from collections.abc import Callable
from typing import Any, TypeVar

S = TypeVar("S", bound=type)

_strategies: dict[str, type[Any]] = {}
broken: list[str] = []
"""Files of this folder that could not be imported, and why; the other strategies work without them."""


def register(name: str) -> Callable[[S], S]:
    """Return a class decorator that registers a strategy under `name`; ValueError if the name is taken."""

    def add(cls: S) -> S:
        if name in _strategies:
            raise ValueError(f"strategy {name!r} is registered already, by {_strategies[name].__qualname__}")
        _strategies[name] = cls
        return cls

    return add


def available() -> tuple[str, ...]:
    """Return the names of all strategies."""
    return tuple(sorted(_strategies))


def left_out() -> str:
    """Return what an error about an unknown name adds: the files that could not be imported; empty if all could."""
    return f"; left out: {'; '.join(broken)}" if broken else ""


def get(name: str) -> type[Any]:
    """Return the strategy called `name`, which must be one of `available()`."""
    return _strategies[name]
