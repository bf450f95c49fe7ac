"""The arguments of a call by their names."""

import inspect
from collections.abc import Callable
from typing import Any


def named_arguments(function: Callable[..., Any], args: tuple[Any, ...]) -> dict[str, Any]:
    """Return positional arguments of a function by their names."""
    return dict(zip(inspect.signature(function).parameters, args, strict=False)) if args else {}
