"""Former place of `shard` and `lockstep` (then `in_step`) of `strategy.distributed.zero`."""

import warnings
from typing import Any

from strategy.distributed import zero

MOVED = {"shard": "shard", "in_step": "lockstep"}


def __getattr__(name: str) -> Any:
    if name in MOVED:
        warnings.warn(
            f"strategy.zero.{name} moved to strategy.distributed.zero.{MOVED[name]}", DeprecationWarning, stacklevel=2
        )
        return getattr(zero, MOVED[name])
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
