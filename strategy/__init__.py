"""Visual token pruning for multimodal language models: one engine, many strategies."""

import importlib
import pkgutil

from strategy import clse
from strategy.backbone import Asked, Backbone, Layout, Span, register_backbone
from strategy.base import Facts, Grid, Plan, StageBudgets, Strategy, View
from strategy.config import VTRConfig
from strategy.engine import attach, detach, prune
from strategy.record import RunRecord, Stage
from strategy.registry import available, register

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
    importlib.import_module(f"{__name__}.{_found.name}")
