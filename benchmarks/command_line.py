"""What the command lines of all benchmarks share, and what is said about a run."""

import argparse
import subprocess
from collections.abc import Callable
from typing import Any

import torch
import transformers

import strategy
from benchmarks.models import BACKBONES, Case

DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}


def common_parser(description: str | None, new: int, output: str) -> argparse.ArgumentParser:
    """Return a command line with the arguments of every benchmark.

    Args:
        description: What the benchmark does.
        new: The default of `--new`.
        output: The default of `--output`.
    """
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--backbone", required=True, choices=BACKBONES)
    parser.add_argument("--budget", default="192", help="keep_tokens, or up to 1 retain_ratio; several, such as 192,64")
    parser.add_argument("--strategy", default="clse", choices=strategy.available())
    parser.add_argument("--dtype", choices=DTYPES, help="float16 on a GPU, else float32")
    parser.add_argument("--new", type=int, default=new, help="tokens decoded an answer")
    parser.add_argument("--output", default=output, help="folder for what is written")
    return parser


def dtype_of(arguments: argparse.Namespace, device: torch.device) -> torch.dtype:
    """Return the type of the weights: the given one, or the one that fits the device."""
    return DTYPES[arguments.dtype or ("float32" if device.type == "cpu" else "float16")]


def ways_of(arguments: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """Return the options of `strategy.VTRConfig` for each way to answer, the unpruned one first.

    Raises:
        ValueError: A budget is no number, or none that the strategy takes.
    """
    budgets = dict.fromkeys(numbers(arguments.budget, float))
    pruned = {f"pruned {budget:g}": pruned_options(arguments.strategy, budget) for budget in budgets}
    return {"unpruned": {"enabled": False}, **pruned}


def pruned_options(name: str, budget: float) -> dict[str, Any]:
    """Return the options of `strategy.VTRConfig` for a strategy with a budget, tokens or up to 1 a ratio.

    Raises:
        ValueError: The strategy takes no such budget.
    """
    options = {"strategy": name, **({"retain_ratio": budget} if budget <= 1 else {"keep_tokens": int(budget)})}
    strategy.VTRConfig(**options)
    return options


def numbers(text: str, kind: Callable[[str], Any]) -> list[Any]:
    """Return the numbers of a comma-separated list.

    Raises:
        ValueError: One of them is no number.
    """
    try:
        return [kind(each) for each in text.split(",") if each]
    except ValueError:
        raise ValueError(f"{text!r}: want numbers with commas between them, such as 192,64") from None


def commit() -> str:
    """Return the commit that is measured, with a plus if files differ from it."""
    try:
        found = subprocess.run(["git", "describe", "--always", "--dirty=+"], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return found.stdout.strip()


def facts(
    arguments: argparse.Namespace, case: Case, device: torch.device, dtype: torch.dtype, command: str
) -> dict[str, Any]:
    """Return what is measured, on which device and with which versions."""
    return {
        "backbone": arguments.backbone,
        "strategy": arguments.strategy,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU, a small size",
        "dtype": str(dtype).removeprefix("torch."),
        "visual": case.visual,
        "tokens": case.tokens,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "commit": commit(),
        "command": command,
    }
