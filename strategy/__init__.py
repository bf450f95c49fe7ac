"""Visual token pruning for multimodal language models: one engine, many strategies."""

from strategy import clse, controls, divprune, fastv, pdrop, priortr, sparsevlm
from strategy.backbone import Backbone, Layout, Span, register_backbone
from strategy.base import Facts, Grid, Plan, StageBudgets, Strategy, View
from strategy.config import VTRConfig
from strategy.engine import attach, detach, prune
from strategy.record import RunRecord, Stage
from strategy.registry import available, register

__all__ = [
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
    "controls",
    "detach",
    "divprune",
    "fastv",
    "pdrop",
    "priortr",
    "prune",
    "register",
    "register_backbone",
    "sparsevlm",
]
