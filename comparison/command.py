"""What the two commands share: the model they ask, and the pruning knobs of a run."""

import argparse
import importlib
from typing import Any

from strategy.config import VTRConfig, field_names

VIDEO = "videollava"


def parser(description: str | None) -> argparse.ArgumentParser:
    """A command line with the arguments that say which model."""
    made = argparse.ArgumentParser(description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    model = made.add_argument_group("model")
    model.add_argument("--model", required=True, help=f"its name in lmms-eval, or {VIDEO}")
    model.add_argument("--pretrained", required=True, help="folder or hub id of the weights")
    model.add_argument("--model_args", default="", help="more arguments of the lmms-eval model, as name=value,...")
    model.add_argument("--include_path", help="folder of more lmms-eval tasks")
    return made


def evaluator(options: argparse.Namespace) -> Any:
    """What asks the model: a `Videos` or an `Lmms`, which know the same two methods."""
    given = options.model, options.pretrained, options.model_args, options.include_path
    # Each can be imported in its own environment only.
    if options.model == VIDEO:
        return importlib.import_module("comparison.videos").Videos(*given)
    return importlib.import_module("comparison.lmms").Lmms(*given)


def knobs(strategy: str, budget: int | None, **more: Any) -> dict[str, Any]:
    """The knobs of a run, checked; without a budget, those of the unpruned one."""
    if budget is None:
        return {"enabled": False}
    made = {"strategy": strategy, "keep_tokens": budget} | more
    VTRConfig(**made)
    return made


def add_knobs(made: argparse.ArgumentParser) -> None:
    """Add the pruning knobs to a command line."""
    group = made.add_argument_group("pruning, see the README")
    for name in field_names():
        if name != "enabled":
            group.add_argument(f"--{name}", default=argparse.SUPPRESS)
