"""Visual token pruning for multimodal language models: one engine, many strategies."""

import importlib
import pkgutil
import warnings

from strategy import clse
from strategy.backbone import Asked, Backbone, Layout, Span, register_backbone
from strategy.base import Facts, Grid, Plan, StageBudgets, Strategy, View
from strategy.config import VTRConfig
from strategy.engine import attach, detach, prune
from strategy.record import RunRecord, Stage
from strategy.registry import available, broken, register

__all__ = [
    "Asked",
    "Backbone",
    "Facts",
    "Grid",
    "Layout",
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
    "prune",
    "register",
    "register_backbone",
]

# A strategy is one file in this folder: whatever lies here is imported, so that it registers itself.
for _found in pkgutil.iter_modules(__path__):
    try:
        importlib.import_module(f"{__name__}.{_found.name}")
    except Exception as _error:
        broken.append(f"{_found.name}.py ({type(_error).__name__}: {_error})")
        warnings.warn(f"left out of the strategies: {broken[-1]}", stacklevel=2)
