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
    base, pruned = rows["unpruned graph", 1], rows["pruned graph", 1]
    if math.isnan(base["graph"] + pruned["graph"]):  # a CPU has no graphs
        return
    about = found["about"]
    limit = PREFILL.get((about["backbone"], about["budget"]))

    def most(what: str, figure: float, limit: float) -> tuple[str, float, float, bool]:
        return what, limit, figure, figure <= limit

    if limit is not None:
        yield most("prefill over unpruned, on the device, at most", pruned["graph"] / base["graph"], limit)
    yield most("prefill over that of a free method, at most", pruned["graph"] / found["free"], FREE)
    yield most("prefill over the arithmetic floor, at most", pruned["graph"] / found["floor"]["pruned"], FLOOR)
    yield most(
        "scoring, selecting, gathering: share of the prefill, at most", 1 - found["free"] / pruned["graph"], SCORING
    )
    yield most("ms a decoded token, at most", pruned["decode"], DECODE)
    yield most("bytes of the cache over those of the kept tokens, at most", pruned["held"] / found["kept_bytes"], 1.0)
    wide = rows.get(("unpruned graph", WIDE)), rows.get(("pruned graph", WIDE))
    if all(wide):
        gain = wide[0]["prefill"] / wide[1]["prefill"]
        ratio = found["operations"]["unpruned"] / found["operations"]["pruned"]
        yield (
            f"gain at batch {WIDE} over that of operations, at least",
            SHARE_OF_RATIO,
            gain / ratio,
            bool(gain / ratio >= SHARE_OF_RATIO),
        )
