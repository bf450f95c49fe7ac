"""Measure a batch of pictures of as many sizes, beside as many pictures of one size with as many visual tokens.

The batch of many sizes is measured twice: with sizes that no batch had before, and with the same sizes for the third
time. For a model of the Qwen families, whose pictures keep their size.
"""

import argparse
import json
import random
import statistics
import sys
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from tqdm import tqdm

from benchmarks.command_line import common_parser, dtype_of, facts, ways_of
from benchmarks.measure import attached, wall_ms
from benchmarks.models import Case, build
from benchmarks.report import mixed_table
from benchmarks.speed import stem_of
from strategy.evaluation.files import write_whole
from strategy.metrics.record import RunRecord

SMALLEST, LARGEST = 0.4, 1.6  # pictures, of the mean size
MEASURED = 5  # batches of each kind


class MixedRow(NamedTuple):
    """What a batch takes on average.

    Attributes:
        name: The way to answer, with its engine.
        sizes: Whether the pictures have one size, as many sizes as there are pictures, or the same for the third time.
        visual: Visual tokens of the batch.
        vision, prefill: Ms of the vision tower and of the decoder.
        first: Ms from the pixels to the first tokens.
        answers: Ms from the pixels to the last tokens, of another such batch.
    """

    name: str
    sizes: str
    visual: int
    vision: float
    prefill: float
    first: float
    answers: float


def grids(batch: int, mean: int, seed: int) -> list[tuple[int, int]]:
    """Return as many different sizes (height, width) of pictures, in visual tokens, with so many tokens on average."""
    draw = random.Random(seed)
    found: list[tuple[int, int]] = []
    for number in range(batch):
        share = number / max(1, batch - 1)
        area = mean * (SMALLEST + (LARGEST - SMALLEST) * share)
        height = round((area * draw.uniform(0.5, 2)) ** 0.5)
        found.append((height, round(area / height)))
    draw.shuffle(found)
    return found


def prompts(case: Case, sizes: Sequence[tuple[int, int]]) -> dict[str, Any]:
    """Return the inputs of `generate` for prompts like that of a case, each with a picture of a size of its own."""
    model, (ids,) = case.model, case.inputs["input_ids"].tolist()
    config, merge = model.config, model.config.vision_config.spatial_merge_size
    first = ids.index(config.image_token_id)
    before, after = ids[:first], ids[first + case.visual :]
    rows = [[*before, *[config.image_token_id] * (height * width), *after] for height, width in sizes]
    length = max(map(len, rows))
    padded = [[model.generation_config.pad_token_id] * (length - len(row)) + row for row in rows]
    mask = [[0] * (length - len(row)) + [1] * len(row) for row in rows]
    pixels = case.inputs["pixel_values"]
    patches = sum(height * width for height, width in sizes) * merge**2
    return {
        "input_ids": torch.tensor(padded, device=model.device),
        "attention_mask": torch.tensor(mask, device=model.device),
        "pixel_values": torch.randn(patches, pixels.shape[1], dtype=pixels.dtype, device=model.device),
        "image_grid_thw": torch.tensor([[1, height * merge, width * merge] for height, width in sizes]),
    }


def measured(name: str, case: Case, batch: int, new: int, **options: Any) -> Iterator[MixedRow]:
    """Yield the rows of one way to answer; options are those of `strategy.VTRConfig`."""
    merge = case.model.config.vision_config.spatial_merge_size
    _, rows, columns = case.inputs["image_grid_thw"][0].tolist()
    one = (rows // merge, columns // merge)

    with attached(case, **options) as record:

        def row(sizes: str, pairs: Sequence[tuple[dict[str, Any], dict[str, Any]]]) -> MixedRow:
            found = [_times(case, record, *pair, new) for pair in pairs]
            visual = statistics.mean(int(one["image_grid_thw"].prod(1).sum()) // merge**2 for one, _ in pairs)
            return MixedRow(name, sizes, round(visual), *map(statistics.median, zip(*found, strict=True)))

        def of_sizes(seed: int) -> dict[str, Any]:
            return prompts(case, grids(batch, case.visual, seed))

        alike, others = (prompts(case, [one] * batch) for _ in range(2))
        warm_up = [(alike, others)] * 3 + [(of_sizes(0), of_sizes(1))]
        for pair in warm_up:  # until all is compiled and captured
            _times(case, record, *pair, new)
        yield row("one", [(alike, others)] * MEASURED)
        # Of a pair, so that the second answer does not find the sizes of the first one.
        seeds = range(2, 2 + 2 * MEASURED, 2)
        yield row("many", [(of_sizes(seed), of_sizes(seed + 1)) for seed in seeds])
        same = of_sizes(2)
        for _ in range(2):
            _times(case, record, same, same, new)
        yield row("many, third time", [(same, same)] * MEASURED)


def _times(
    case: Case, record: RunRecord, short: dict[str, Any], long: dict[str, Any], new: int
) -> tuple[float, float, float, float]:
    """Return the ms of a batch's vision tower, prefill and first tokens, and those of another batch's answers."""
    before = record.clock.seconds()
    model = case.model
    first = wall_ms(lambda: model.generate(**short, do_sample=False, max_new_tokens=1), model.device)
    spent = record.clock.seconds()
    answers = wall_ms(lambda: model.generate(**long, do_sample=False, max_new_tokens=new), model.device)
    vision, prefill = (1000 * (spent[part] - before.get(part, 0)) for part in ("vision", "prefill"))
    return vision, prefill, first, answers


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = common_parser(__doc__, new=16, output="results/mixed")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu: a small size")
    parser.add_argument("--batch", type=int, default=16, help="how many pictures are answered at once")
    given = parser.parse_args(arguments)
    if not given.backbone.startswith("qwen"):
        parser.error(f"--backbone {given.backbone}: its pictures have one size; allowed are the Qwens")
    if given.batch < 2:
        parser.error(f"--batch {given.batch}: want at least 2")
    try:
        given.ways = ways_of(given)
    except ValueError as error:
        parser.error(str(error))
    return given


def main(arguments: list[str] | None = None) -> None:
    """Measure, print the table, and write the table and the JSON."""
    given = parse(arguments)
    command = " ".join(["python -m benchmarks.mixed", *(sys.argv[1:] if arguments is None else arguments)])
    device = torch.device(given.device)
    dtype = dtype_of(given, device)
    case = build(given.backbone, given.device, dtype, small=device.type == "cpu")
    # Pruned answers by the graph engine first, in case that the run ends early.
    kinds = [(way, engine) for engine in ("graph", "eager") for way in reversed(given.ways)]
    found: dict[str, Any] = {"about": facts(given, case, device, dtype, command), "rows": []}
    stem = f"{Path(given.output) / stem_of(given)}_{given.batch}"
    Path(given.output).mkdir(parents=True, exist_ok=True)
    for way, engine in tqdm(kinds, desc="Measuring", unit="way"):
        for row in measured(f"{way} {engine}", case, given.batch, given.new, engine=engine, **given.ways[way]):
            found["rows"].append(row._asdict())
            write_whole(Path(f"{stem}.json"), json.dumps(found, indent=1).encode())
    table = mixed_table(found)
    write_whole(Path(f"{stem}.md"), table.encode())
    print(table)
    print(f"written: {stem}.json and .md")


if __name__ == "__main__":
    warnings.simplefilter("default")
    main()
