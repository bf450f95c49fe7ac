"""Which strategies are tried on which kinds of prompts, where each trial is expensive."""

import os
from collections.abc import Iterable

from pairs import BACKBONES, share

import strategy

NAMES = ["unpruned", *strategy.available()]
FIRST = ("unpruned", "clse")  # which all backbones try
KINDS = ("one", "several", "mixed")
FULL = "VTR_FULL_MATRIX" in os.environ  # set by `--full`, also for the processes
# Each strategy on the prompts that differ most, and two on every kind.
CELLS = [(name, kind) for name in NAMES for kind in KINDS if FULL or kind == "mixed" or name in FIRST]


def names_for(backbone: str) -> list[str]:
    """The strategies that a backbone tries of what each does alike on all: the first two, and its share of the rest."""
    rest = [name for name in NAMES if name not in FIRST]
    return NAMES if FULL else [*FIRST, *(share(rest, backbone) if backbone in BACKBONES else ())]


def cells(names: Iterable[str]) -> list[tuple[str, str]]:
    """The strategies named, in that order, each with the kinds of prompts that it is tried on."""
    return [(name, kind) for each in names for name, kind in CELLS if name == each]
