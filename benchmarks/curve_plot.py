"""The points of `benchmarks.curves` as a picture."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, NullLocator

NAMES = {
    "batch": "prompts in a batch",
    "visual": "visual tokens of a prompt",
    "frames": "frames of a video",
    "budget": "budget, as a share of the visual tokens",
}
UNPRUNED = "unpruned"
WIDE = 10  # times that the largest value is the smallest where an axis is logarithmic


def curve_picture(found: dict[str, Any], file: Path) -> None:
    """Draw prefill and vision tower, and the decode step, against what is varied, with their floors, into a PNG.

    Args:
        found: What `benchmarks.curves` wrote.
        file: The PNG.
    """
    about = found["about"]
    figure = Figure(figsize=(8, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    ways = dict.fromkeys(point["way"] for point in found["points"])
    for place, way in enumerate(sorted(ways, key=lambda way: way != UNPRUNED)):
        own = _series(found, found["points"], way)
        _draw(left, own, way, f"C{place}", ("prefill", "prefill_floor"), by_prompt=True)
        _draw(right, own, way, f"C{place}", ("decode", "decode_floor"), by_prompt=False)
    _draw(left, _series(found, found["towers"]), "vision tower", "gray", ("time", "floor"), by_prompt=True)
    left.set_title("prefill, ms a prompt")
    right.set_title("decode, ms a step")
    for axes in (left, right):
        _scale(axes, _values(found))
        axes.set_xlabel(NAMES[about["vary"]])
    left.plot([], [], "--", color="black", label="floor")
    if any(point["graphless"] for point in found["points"]):
        left.plot([], [], "o", color="black", markerfacecolor="white", label="without a graph")
    handles, labels = left.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), frameon=False, columnspacing=1.2)
    figure.suptitle(f"{about['backbone']}, pruned by {about['strategy']}, {about['device']}, {about['dtype']}")
    figure.savefig(file, dpi=150)


def _series(found: dict[str, Any], points: Sequence[dict[str, Any]], way: str | None = None) -> list[dict[str, Any]]:
    """Return what was measured of a way, or of the tower; without pruning both cost the same at all budgets."""
    own = [point for point in points if point.get("way") == way and not point["failure"]]
    if found["about"]["vary"] == "budget" and way in (None, UNPRUNED):
        return [point | {"value": value} for point in own for value in _values(found)]
    return own


def _values(found: dict[str, Any]) -> list[float]:
    return sorted({point["value"] for point in found["points"]})


def _draw(
    axes: Axes, points: Sequence[dict[str, Any]], label: str, colour: str, keys: tuple[str, str], by_prompt: bool
) -> None:
    """Draw a time and its floor, if there are any; where a program had no graph, the marker is hollow.

    Args:
        axes: Where to draw.
        points: The points.
        label: Names the line.
        colour: Its colour.
        keys: Of the time and of its floor.
        by_prompt: Whether to divide by the batch.
    """
    if not points:
        return
    values = [point["value"] for point in points]
    times, floors = ([point[key] / (point["batch"] if by_prompt else 1) for point in points] for key in keys)
    hollow = [any(each.startswith(keys[0]) for each in point.get("graphless", ())) for point in points]
    axes.plot(values, times, "-", color=colour, label=label)
    axes.plot(values, floors, "--", color=colour)
    faces = ["white" if each else colour for each in hollow]
    axes.scatter(values, times, s=28, facecolors=faces, edgecolors=colour, zorder=3)


def _scale(axes: Axes, values: Sequence[float]) -> None:
    """Make the axis of what is varied logarithmic, and that of ms where its values differ much; else let it begin at 0.

    Args:
        axes: The axes.
        values: What is varied.
    """
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_locator(FixedLocator(values))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.xaxis.set_minor_locator(NullLocator())
    heights = [height for line in axes.get_lines() for height in np.asarray(line.get_ydata(), dtype=float)]
    if heights and max(heights) > WIDE * min(heights):
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.yaxis.set_minor_locator(NullLocator())
    else:
        axes.set_ylim(0, 1.1 * max(heights, default=1))
    axes.grid(alpha=0.3)
