"""The one list of strategies: it feeds the configuration's check, the command lines, the docs and the tests."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from strategy.base import Strategy

_strategies: dict[str, type[Strategy]] = {}
broken: list[str] = []
"""Files of this folder that could not be imported, and why: they do not take the others with them."""


def register(name: str) -> Callable[[type[Strategy]], type[Strategy]]:
    """Class decorator that makes a strategy known under `name`; ValueError if the name is taken."""

    def add(cls: type[Strategy]) -> type[Strategy]:
        if name in _strategies:
            raise ValueError(f"strategy {name!r} is registered already, by {_strategies[name].__qualname__}")
        _strategies[name] = cls
        return cls

    return add


def available() -> tuple[str, ...]:
    """The names of all strategies."""
    return tuple(sorted(_strategies))


def left_out() -> str:
    """What an error about an unknown name adds: the files that could not be imported, and why; empty if all could."""
    return f"; left out: {'; '.join(broken)}" if broken else ""


def get(name: str) -> type[Strategy]:
    """The strategy called `name`, which must be one of `available()`."""
    return _strategies[name]
