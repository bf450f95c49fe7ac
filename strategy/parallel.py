"""Former place of `strategy.distributed.tensor_parallel.split`."""

import warnings
from typing import Any

from strategy.distributed import tensor_parallel


def __getattr__(name: str) -> Any:
    if name == "split":
        warnings.warn(
            "strategy.parallel.split moved to strategy.distributed.tensor_parallel.split",
            DeprecationWarning,
            stacklevel=2,
        )
        return tensor_parallel.split
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
