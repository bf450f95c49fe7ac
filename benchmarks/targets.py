"""Targets, and the measured figures beside them."""

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

# Pruned over unpruned prefill, both fused and graphed, at most.
PREFILL = {
    ("llava", 192): 0.55,
    ("llava", 64): 0.45,
    ("video", 194): 0.27,
    ("qwen2", 0.334): 0.50,
    ("qwen2", 0.112): 0.32,
}
FREE, FLOOR, SCORING, DECODE, SHARE_OF_RATIO = 1.08, 1.6, 0.05, 5.0, 0.85
WIDE = 32  # prompts of a batch that must gain what its operations promise


class Target(NamedTuple):
    """What is wanted, its limit, what was measured, and whether that is within the limit."""

    name: str
    limit: float
    measured: float
    met: bool


def targets(found: dict[str, Any]) -> Iterator[Target]:
    """Yield the targets that a run has figures for."""
    rows = {(row["name"], row["batch"]): row for row in found["rows"]}
    unpruned, base = found["ways"]["unpruned"], rows["unpruned graph", 1]
    for name, way in found["ways"].items():
        pruned = rows[f"{name} graph", 1]
        if way["free"] is None or math.isnan(base["graph"] + pruned["graph"]):  # a CPU has no graphs
            continue
        at_most = {
            "prefill over unpruned, on the device": (
                pruned["graph"] / base["graph"],
                PREFILL.get((found["about"]["backbone"], way["budget"])),
            ),
            "prefill over that of a free method": (pruned["graph"] / way["free"], FREE),
            "prefill over the arithmetic floor": (pruned["graph"] / way["floor"], FLOOR),
            "scoring, selecting, gathering: share of the prefill": (1 - way["free"] / pruned["graph"], SCORING),
            "ms a decoded token": (pruned["decode"], DECODE),
            "bytes of the cache over those of the kept tokens": (pruned["held"] / way["kept_bytes"], 1.0),
        }
        for what, (measured, limit) in at_most.items():
            if limit is not None:
                yield Target(f"{name}: {what}, at most", limit, measured, measured <= limit)
        wide = [rows.get((f"{each} graph", WIDE), {}).get("prefill") for each in ("unpruned", name)]
        if None not in wide:
            measured = wide[0] / wide[1] / (unpruned["operations"] / way["operations"])
            what = f"{name}: gain at batch {WIDE} over that of operations, at least"
            yield Target(what, SHARE_OF_RATIO, measured, measured >= SHARE_OF_RATIO)
