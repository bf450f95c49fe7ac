"""What `compare --list` prints: each strategy with its paper, its defaults, and what it needs."""

import argparse
import re
import sys
from typing import Any

from pytablewriter import SpaceAlignedTableWriter

import strategy
from strategy import Facts, VTRConfig, registry

# A decoder as deep as that of LLaVA-1.5-7B, with as many visual tokens.
FACTS = Facts(depth=32, nominal_tokens=576)


class ListStrategies(argparse.Action):
    """Prints the strategies and ends the program, before anything else is asked of the command line."""

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> None:
        """Print the table."""
        print(*strategy_lines(), sep="\n")
        parser.exit()


def needs_of(name: str) -> str:
    """Return what a strategy needs besides the features of visual tokens and words."""
    cls = registry.get(name)
    needs = []
    try:
        cls(VTRConfig(strategy=name, prune_layer=0, ref_layers=None)).plan(FACTS)
    except ValueError:
        needs.append("a prune at layer 1 or later")
    if cls.question_free:
        needs.append("a second prefill without the question")
    if cls.encoder_layer is not None:
        needs.append(f"layer {cls.encoder_layer} of the vision tower, on models whose backbone describes it")
    needs += [f"if you like, {option}" for option in cls.options_type.weights]
    return "; ".join(needs) or "nothing else"


def strategy_lines() -> list[str]:
    """Return the lines of a table of strategies, with a header."""
    rows = [("strategy", "prunes at", "keeps of 576", "paper", "needs")]
    for name in strategy.available():
        plan = registry.get(name)(VTRConfig(strategy=name)).plan(FACTS)
        about = (sys.modules[registry.get(name).__module__].__doc__ or "").partition("):")[0]
        paper = re.search(r"\((.*arXiv [\d.]+)", about)
        layers, kept = (
            separator.join(map(str, numbers))
            for separator, numbers in ((", ", plan.layers), ("/", plan.kept(FACTS.nominal_tokens)))
        )
        rows.append((name, layers, kept, paper[1] if paper else "-", needs_of(name)))
    # The writer parses numbers otherwise, and centres a header of its own.
    writer = SpaceAlignedTableWriter(value_matrix=rows, type_hints=["String"] * len(rows[0]))
    return [line.rstrip() for line in writer.dumps().splitlines()]
