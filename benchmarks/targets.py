"""What the measured figures are held against."""

import math
from collections.abc import Iterator
from typing import Any

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


def targets(found: dict[str, Any]) -> Iterator[tuple[str, float, float, bool]]:
    """What is asked, the limit, the figure and whether it is kept, for those that a run has figures for."""
    rows = {(row["name"], row["batch"]): row for row in found["rows"]}
    unpruned, base = found["ways"]["unpruned"], rows["unpruned graph", 1]
    for way, told in found["ways"].items():
        pruned = rows[f"{way} graph", 1]
        if told["free"] is None or math.isnan(base["graph"] + pruned["graph"]):  # a CPU has no graphs
            continue
        gain = [rows.get((f"{each} graph", WIDE), {}).get("prefill") for each in ("unpruned", way)]
        ratio = unpruned["operations"] / told["operations"]
        most = {
            "prefill over unpruned, on the device": (
                pruned["graph"] / base["graph"],
                PREFILL.get((found["about"]["backbone"], told["budget"])),
            ),
            "prefill over that of a free method": (pruned["graph"] / told["free"], FREE),
            "prefill over the arithmetic floor": (pruned["graph"] / told["floor"], FLOOR),
            "scoring, selecting, gathering: share of the prefill": (1 - told["free"] / pruned["graph"], SCORING),
            "ms a decoded token": (pruned["decode"], DECODE),
            "bytes of the cache over those of the kept tokens": (pruned["held"] / told["kept_bytes"], 1.0),
        }
        for what, (figure, limit) in most.items():
            if limit is not None:
                yield f"{way}: {what}, at most", limit, figure, figure <= limit
        if None not in gain:
            figure = gain[0] / gain[1] / ratio
            what = f"{way}: gain at batch {WIDE} over that of operations, at least"
            yield what, SHARE_OF_RATIO, figure, figure >= SHARE_OF_RATIO
