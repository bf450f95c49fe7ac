"""Visual token pruning for multimodal language models: one engine, many strategies."""

import importlib
import pkgutil
import warnings
from typing import Any

from strategy import clse
from strategy.attach import attach, detach, prune
from strategy.backbone import Backbone, GreedyRequest, Layout, Span, register_backbone
from strategy.base import Strategy, View
from strategy.config import VTRConfig
from strategy.kernels.layer_spec import LayerSpec
from strategy.metrics.record import RunRecord, Stage
from strategy.options import Options, option
from strategy.plan import Facts, Grid, Plan, StageBudgets
from strategy.registry import available, broken, register

__all__ = [
    "Backbone",
    "Facts",
    "GreedyRequest",
    "Grid",
    "LayerSpec",
    "Layout",
    "Options",
    "Plan",
    "RunRecord",
    "Span",
    "Stage",
    "StageBudgets",
    "Strategy",
    "VTRConfig",
    "View",
    "attach",
    "available",
    "clse",
    "detach",
    "option",
    "prune",
    "register",
    "register_backbone",
]

# A strategy is one file in this folder: every module here is imported, so that it registers itself.
for _found in pkgutil.iter_modules(__path__):
    if _found.ispkg:
        continue
    try:
        importlib.import_module(f"{__name__}.{_found.name}")
    except Exception as _error:
        broken.append(f"{_found.name}.py ({type(_error).__name__}: {_error})")
        warnings.warn(f"left out of the strategies: {broken[-1]}", stacklevel=2)


def __getattr__(name: str) -> Any:
    if name == "Asked":
        warnings.warn("strategy.Asked is called strategy.GreedyRequest", DeprecationWarning, stacklevel=2)
        return GreedyRequest
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
