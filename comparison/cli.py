"""What the command lines of `compare` and `look` share: the model, and the options of pruning."""

import argparse
import importlib
import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any, Protocol

import strategy
from comparison.inspection import Inspection
from comparison.runs import DOWNSAMPLE, NOMINAL, Run
from strategy.config import ALIASES, VTRConfig, describe_options, strategy_options

VIDEO = "videollava"
UNPRUNED_OPTIONS = ("engine",)  # options that matter without pruning, too
OptionValues = Mapping[str, Any]
"""Options of a run, by name: those of `strategy.VTRConfig`, and two of `comparison.runs`, DOWNSAMPLE and NOMINAL."""


class Evaluator(Protocol):
    """Answers questions with one model.

    Attributes:
        package: The package of the model's backbone.
    """

    package: str

    def run(self, task: str, options: OptionValues, limit: int | None) -> Run:
        """Answer and score a task's questions, the first `limit` if given."""

    def inspect_many(
        self, task: str, numbers: Sequence[int], options: OptionValues, limit: int | None
    ) -> list[Inspection]:
        """Answer some of a task's questions one by one, and return how each was answered."""

    def inspect_one(self, image: str, question: str, options: OptionValues) -> Inspection:
        """Answer a question about the picture or video in a file; ValueError if the file cannot be read."""


def model_parser(description: str | None) -> argparse.ArgumentParser:
    """Return a command line with the arguments that name the model."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    model = parser.add_argument_group("model")
    model.add_argument("--model", required=True, help=f"its name in lmms-eval, or {VIDEO}")
    model.add_argument("--pretrained", required=True, help="folder or hub id of the weights")
    model.add_argument("--model_args", default="", help="more arguments of the lmms-eval model, as name=value,...")
    model.add_argument("--include_path", help="folder of more lmms-eval tasks")
    return parser


def load_evaluator(arguments: argparse.Namespace) -> Evaluator:
    """Return the evaluator of the model that a command line names."""
    given = arguments.model, arguments.pretrained, arguments.model_args, arguments.include_path
    # Each of the two modules can be imported only in the environments of its backbones.
    evaluator: Evaluator
    if arguments.model == VIDEO:
        evaluator = importlib.import_module("comparison.videos").Videos(*given)
    else:
        evaluator = importlib.import_module("comparison.lmms").Lmms(*given)
    return evaluator


def add_options(parser: argparse.ArgumentParser, set_otherwise: Collection[str]) -> None:
    """Add the options of pruning to a command line, except those that the command sets in another way."""
    group = parser.add_argument_group("pruning")
    users = strategy_options()
    for name, (default, sentence) in describe_options().items():
        if name in set_otherwise:
            continue
        notes = [f"used by {', '.join(users[name])}"] if name in users else []
        notes += [f"one of {', '.join(strategy.available())}"] if name == "strategy" else []
        notes += [] if default is None else [f"default: {default}"]
        text = f"{sentence} ({'; '.join(notes)})" if notes else sentence
        group.add_argument(f"--{name}", default=argparse.SUPPRESS, help=text.replace("%", "%%"))


def take_options(arguments: argparse.Namespace, set_otherwise: Collection[str], how: str) -> dict[str, Any]:
    """Return the options of pruning that a command line gives, and take those in `--model_args` out of there.

    Args:
        arguments: The parsed command line.
        set_otherwise: As for `add_options`.
        how: How the command sets those, for an error.

    Raises:
        ValueError: An option is given twice, or in `--model_args` although the command sets it.
    """
    allowed = [name for name in describe_options() if name not in set_otherwise]
    options = {name: getattr(arguments, name) for name in allowed if hasattr(arguments, name)}
    text, rest = arguments.model_args, []
    # A comma inside a value, as in a list, has no name and equals sign behind it.
    for part in re.split(r",(?=\s*\w+\s*=)", text):
        name, _, value = part.partition("=")
        name = name.strip().removeprefix("vtr_")
        name = ALIASES.get(name, name)
        if name in set_otherwise:
            raise ValueError(f"--model_args {text}: leave out {name}, {how}")
        if name in options:
            raise ValueError(f"--model_args {text}: {name} is given already: leave it out here")
        if name in allowed:
            options[name] = value.strip()
        else:
            rest.append(part)
    arguments.model_args = ",".join(rest)
    return options


def pruned_options(name: str, given: OptionValues, **own: Any) -> dict[str, Any]:
    """Return the options of a pruned run: those that are given and that the strategy `name` uses, and its own.

    Raises:
        ValueError: As for `VTRConfig`.
    """
    users = strategy_options()
    used = {option: value for option, value in given.items() if name in users.get(option, (name,))}
    options = {"strategy": name} | own | used
    VTRConfig(**options)
    return options


def unpruned_options(given: OptionValues) -> dict[str, Any]:
    """Return the options of the unpruned run: of those that are given, the ones that matter without pruning."""
    return {"enabled": False} | {name: given[name] for name in UNPRUNED_OPTIONS if name in given}


def downsample_options(given: OptionValues, budget: int) -> dict[str, Any]:
    """Return the options of an unpruned run on smaller pictures: the model's argument `downsample` is among them."""
    return unpruned_options(given) | {DOWNSAMPLE: budget}


def config_of(options: OptionValues, **defaults: Any) -> VTRConfig:
    """Return the configuration of a run, with defaults of the caller's for options that the run does not have."""
    return VTRConfig(**defaults | {name: value for name, value in options.items() if name not in (DOWNSAMPLE, NOMINAL)})


def check_used(given: OptionValues, strategies: Sequence[str]) -> None:
    """Raise ValueError for an option that none of the strategies uses."""
    users = strategy_options()
    for option, value in given.items():
        users_of_option = users.get(option, tuple(strategies))
        if not set(users_of_option) & set(strategies):
            raise ValueError(
                f"{option}={value!r}: none of {', '.join(strategies)} uses it: leave it out, or choose "
                f"{' or '.join(users_of_option)}"
            )
