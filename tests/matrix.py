"""Which strategies are tried on which kinds of prompts, where each trial is expensive."""

import os
from collections.abc import Iterable
from typing import Any

from pairs import BACKBONES, share

import strategy
from strategy.backbone import find_backbone

NAMES = ["unpruned", *strategy.available()]
FIRST = ("unpruned", "clse")  # which all backbones try
# Those that look at the vision tower, which a bare decoder does not have.
ENCODED = [name for name in strategy.available() if strategy.registry.get(name).encoder_layer is not None]
BARE = [name for name in strategy.available() if name not in ENCODED]
KINDS = ("one", "several", "mixed")
FULL = "VTR_FULL_MATRIX" in os.environ  # set by `--full`, also for the processes
# Each strategy on the prompts that differ most, and two on every kind.
CELLS = [(name, kind) for name in NAMES for kind in KINDS if FULL or kind == "mixed" or name in FIRST]


def names_for(backbone: str) -> list[str]:
    """The strategies that a backbone tries of what each does alike on all: the first two, and its share of the rest."""
    rest = [name for name in (*BARE, *ENCODED) if name not in FIRST]
    return NAMES if FULL else [*FIRST, *(share(rest, backbone) if backbone in BACKBONES else ())]


def cells(names: Iterable[str]) -> list[tuple[str, str]]:
    """The strategies named, in that order, each with the kinds of prompts that it is tried on."""
    return [(name, kind) for each in names for name, kind in CELLS if name == each]


def runs_on(model: Any, name: str) -> bool:
    """Whether a strategy can prune a whole model: it looks at no vision tower, or the backbone describes that."""
    return name not in ENCODED or find_backbone(model).encoder(model) is not None
