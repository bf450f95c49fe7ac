"""Measure prefill, decode step and vision tower against one varied quantity, beside the least time of each.

Weights are random and of real size. All is measured by the graph engine, unpruned and pruned. The file of points is
written after each; `--plot` makes the table and the picture of it, on any machine.
"""

import argparse
import gc
import json
import math
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from tqdm import tqdm

from benchmarks.command_line import common_parser, dtype_of, facts, numbers
from benchmarks.models import Case, batched, build, resized, sizes_of
from benchmarks.points import Point, measure_point
from benchmarks.roofline import Roofline, measure_roofline
from benchmarks.settings import VARIED, Setting, settings_of
from benchmarks.tower import TowerPoint, VisionCall, measure_tower, replayed, vision_calls
from strategy import registry
from strategy.evaluation.files import write_whole
from strategy.graph.fallback import OOM_REASON
from strategy.kernels.errors import first_line

NO_MEMORY = "does not fit into memory"
SAME = ("backbone", "strategy", "vary", "batch", "device", "dtype")  # in runs whose points make one curve
Result = TypeVar("Result")


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    drawing = argparse.ArgumentParser(add_help=False)
    drawing.add_argument("--plot", nargs="+", type=Path, help="measure nothing, draw the points of these files")
    drawn, _ = drawing.parse_known_args(arguments)
    if drawn.plot:
        return drawing.parse_args(arguments)
    parser = common_parser(__doc__, new=16, output="results/curves")
    parser.set_defaults(budget="192,64")
    parser.add_argument("--vary", required=True, choices=VARIED, help="what is varied")
    parser.add_argument("--values", help="its values in the order of measuring, such as 1,32,64")
    parser.add_argument("--batch", type=int, default=1, help="prompts answered at once, where the batch is not varied")
    parser.add_argument("--repeats", type=int, default=5, help="answers measured a point; 2 where they take long")
    parser.add_argument("--no_tower", action="store_true", help="leave out the vision tower, which compiles for long")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu: a small size")
    parser.add_argument("--plot", nargs="+", help="measure nothing, draw the points of these files")
    given = parser.parse_args(arguments)
    varied = VARIED[given.vary]
    try:
        words = given.values or (varied.small if torch.device(given.device).type == "cpu" else varied.values)
        given.values = [*dict.fromkeys(numbers(words, varied.kind))]
        given.settings = settings_of(given)
    except ValueError as error:
        parser.error(str(error))
    for name, value, least in (
        ("values", min(given.values, default=0), 0 if given.vary == "budget" else 1),
        ("batch", given.batch, 1),
        ("new", given.new, 2),
        ("repeats", given.repeats, 1),
    ):
        if value < least:
            parser.error(f"--{name} {value}: want at least {least}")
    allowed = ["batch", "budget", *sizes_of(given.backbone)]
    if given.vary not in allowed:
        parser.error(
            f"--vary {given.vary}: the prompt of {given.backbone} has a fixed size; allowed are {', '.join(allowed)}"
        )
    if registry.get(given.strategy).encoder_layer is not None:
        parser.error(f"--strategy {given.strategy}: it looks at the vision tower, which runs once for all ways here")
    return given


def measure(given: argparse.Namespace, command: str, file: Path) -> dict[str, Any]:
    """Measure all points and write the file after each.

    Args:
        given: The parsed command line.
        command: The command, for the file.
        file: Where the points are written.

    Returns:
        What was written.
    """
    device = torch.device(given.device)
    dtype = dtype_of(given, device)
    case = build(given.backbone, given.device, dtype, small=device.type == "cpu")
    roofline = measure_roofline(device, dtype)
    about = facts(given, case, device, dtype, command) | {
        "vary": given.vary,
        "batch": given.batch,
        "new": given.new,
        "ceilings": roofline.in_words(),
    }
    found: dict[str, Any] = {"about": about, "points": [], "towers": []}

    def add(kind: str, point: Point | TowerPoint) -> None:
        found[kind].append(point._asdict())
        write_whole(file, json.dumps(found, indent=1).encode())
        tqdm.write(point.in_words(), file=sys.stdout)
        bar.update()

    settings = given.settings
    towers = [] if given.no_tower else settings
    with tqdm(total=sum(len(each.ways) for each in settings) + len(towers), desc="Measuring", unit="point") as bar:
        too_large: dict[str, float] = {}  # by way, the smallest value that does not fit into memory
        for setting in settings:
            for point in points(given, case, setting, roofline, too_large):
                add("points", point)
        # The tower comes last, since the points of the decoder tell more, and it compiles for a minute.
        for setting in towers:
            add("towers", tower_point(given, case, setting, roofline))
    return found


def points(
    given: argparse.Namespace, whole: Case, setting: Setting, roofline: Roofline, too_large: dict[str, float]
) -> Iterator[Point]:
    """Yield the points of a setting; what fails is told, and the next is measured.

    Args:
        given: The parsed command line.
        whole: The backbone's case.
        setting: The setting.
        roofline: The rates of the device.
        too_large: The smallest value of each way that does not fit into memory, which is kept up to date.
    """
    prepared = attempt(lambda: prepare(given, whole, setting))
    for way, value, options in setting.ways:
        if isinstance(prepared, str):
            yield Point(way, value, setting.batch, failure=prepared)
            continue
        if given.vary != "budget" and value > too_large.get(way, math.inf):
            yield Point(way, value, setting.batch, failure=f"{NO_MEMORY}, as {too_large[way]:g} does not")
            continue
        case, inputs, calls = prepared
        measured = attempt(partial(measure_replayed, way, value, case, inputs, calls, given, roofline, options))
        if measured in (NO_MEMORY, OOM_REASON):
            too_large[way] = min(value, too_large.get(way, math.inf))
        yield Point(way, value, setting.batch, failure=measured) if isinstance(measured, str) else measured


def measure_replayed(
    way: str,
    value: float,
    case: Case,
    inputs: dict[str, Any],
    calls: Sequence[VisionCall],
    given: argparse.Namespace,
    roofline: Roofline,
    options: dict[str, Any],
) -> Point:
    """Return a point, for which the vision tower does not run; see `measure_point`."""
    with replayed(case, calls):
        return measure_point(way, value, case, inputs, given.repeats, given.new, roofline, **options)


def tower_point(given: argparse.Namespace, whole: Case, setting: Setting, roofline: Roofline) -> TowerPoint:
    """Return what the vision tower takes, or why that was not measured."""

    def measured() -> TowerPoint:
        case, _, calls = prepare(given, whole, setting)
        return measure_tower(setting.value, case, setting.batch, calls, given.repeats, roofline)

    found = attempt(measured)
    return TowerPoint(setting.value, setting.batch, failure=found) if isinstance(found, str) else found


def prepare(given: argparse.Namespace, whole: Case, setting: Setting) -> tuple[Case, dict[str, Any], list[VisionCall]]:
    """Return the case of a setting, the inputs of its batch, and the calls of the vision tower for them."""
    case = whole if setting.size is None else resized(given.backbone, whole, given.vary, setting.size)
    inputs = batched(case, setting.batch)
    return case, inputs, vision_calls(case, inputs)


def attempt(measure: Callable[[], Result]) -> Result | str:
    """Return what a function returns, or why it failed; then the memory that it took is free again."""
    try:
        return measure()
    except torch.cuda.OutOfMemoryError:
        failure = NO_MEMORY
    except (RuntimeError, ValueError) as error:
        failure = first_line(error)
    # Only now nothing holds the frames of the error, and what they hold.
    gc.collect()
    torch.cuda.empty_cache()
    return failure


def merged(files: Sequence[Path]) -> dict[str, Any]:
    """Return the points of several runs as those of one; of points for the same value the last one counts.

    Raises:
        ValueError: The runs measured different things.
    """
    runs = [json.loads(file.read_text()) for file in files]
    kinds = {tuple(run["about"][name] for name in SAME) for run in runs}
    if len(kinds) > 1:
        raise ValueError(f"the files differ in {', '.join(SAME)}: {kinds}")
    found = {"about": runs[-1]["about"]}
    for kind in ("points", "towers"):
        each = {(point.get("way"), point["value"]): point for run in runs for point in run[kind]}
        found[kind] = sorted(each.values(), key=lambda point: point["value"])
    return found


def draw(found: dict[str, Any], file: Path) -> None:
    """Print the table of a run, and write it and the picture beside the file of points."""
    try:
        # A machine with a GPU need not have what draws.
        from benchmarks.curve_plot import curve_picture  # noqa: PLC0415
        from benchmarks.report import curve_table  # noqa: PLC0415
    except ModuleNotFoundError as error:
        print(f"{error.name} is missing here: give --plot {file} where it is not")
        return
    table = curve_table(found)
    print(table)
    write_whole(file.with_suffix(".md"), table.encode())
    curve_picture(found, file.with_suffix(".png"))
    print(f"written: {file.with_suffix('')}.md and .png")


def main(arguments: list[str] | None = None) -> None:
    """Measure and write the points, or read them; then draw."""
    given = parse(arguments)
    if given.plot:
        file = given.plot[-1]
    else:
        file = Path(given.output) / f"{given.backbone}_{given.strategy}_{given.vary}.json"
        command = "python -m benchmarks.curves " + " ".join(sys.argv[1:] if arguments is None else arguments)
        measure(given, command, file)
        print(f"written: {file}")
    try:
        draw(merged(given.plot or [file]), file)
    except (OSError, ValueError) as error:
        raise SystemExit(f"--plot: {error}") from None


if __name__ == "__main__":
    warnings.simplefilter("default")
    main()
