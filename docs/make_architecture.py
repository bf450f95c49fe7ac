"""Draw docs/architecture.svg: the rooms of the repository, and the way of a prompt through them.

Run it from anywhere: python docs/make_architecture.py
"""

from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from xml.sax.saxutils import escape

PICTURE = Path(__file__).with_suffix("").with_name("architecture.svg")
WIDTH, HEIGHT = 1240, 775
COLOURS = {
    "tools": "#e8e8e8",
    "adapters": "#f6dfc8",
    "evaluation": "#f3ccd2",
    "attach": "#ead3f0",
    "graph": "#d5d6f5",
    "pruning": "#cfe6f8",
    "metrics": "#cdeee6",
    "distributed": "#d8efc9",
    "methods": "#fff0b3",
    "contracts": "#f7e7a0",
    "kernels": "#e3dccb",
    "stock": "#ffffff",
}

# Name, colour, second line; from the top down.
ROOMS = (
    ("comparison/, benchmarks/", "tools", "runs, tables, reports; measured speed"),
    ("image/, video/, serving/", "adapters", "model families, lmms-eval models, the video script; vLLM"),
    ("evaluation/", "evaluation", "what lmms-eval models share: requests, resume"),
    ("attach.py", "attach", "attach, detach, prune"),
    ("graph/", "graph", "greedy answers by fused layers and CUDA graphs"),
    ("pruning/", "pruning", "hooks, stages, the state of a prefill"),
    ("metrics/", "metrics", "what was kept, what it cost"),
    ("distributed/", "distributed", "processes, tensor parallelism, ZeRO"),
    ("base, plan, config, options, registry, backbone", "contracts", "contracts: what strategies and families promise"),
    ("kernels/", "kernels", "functions of tensors; LayerSpec"),
)
METHODS = (
    "clse",
    "fastv",
    "pdrop",
    "priortr",
    "sparsevlm",
    "divprune",
    "cdpruner",
    "dart",
    "apet",
    "v2drop",
    "visionzip",
    "vispruner",
    "scope",
    "mmtok",
    "holov",
    "prunesid",
    "eadp",
    "baselines",
)

# The eager lane and the graph lane; a step that both take stands alone.
STEPS = (
    (
        ("model.generate", "stock", "the stock loop of transformers"),
        ("GraphGenerator.generate", "graph", "FallbackPolicy.reason: who answers?"),
    ),
    (("PruningHooks.read_layout", "pruning", "Backbone.layout: where do the visual tokens lie?"),),
    (None, ("bucket_prompts", "graph", "pad to a multiple of 16 tokens")),
    (("PruningHooks.begin", "pruning", "a new PrefillState; the window is checked"),),
    (
        ("LayerHooks", "pruning", "keep_reference, narrow, forward_layer"),
        ("FusedDecoder.prefill", "graph", "all layers, one program; CudaGraphCache.run"),
    ),
    (("StageRunner.prune", "pruning", "View, Strategy.select, select_top, Strategy.merge, PrefillState.prune"),),
    (
        ("LayerHooks.finish_prefill", "pruning", "StageRunner.finish; pruned_cache.trim"),
        ("StaticKVCache", "graph", "filled while layers run; StageRunner.finish"),
    ),
    (
        ("place_tokens, fit_mask", "pruning", "later tokens on the shorter cache"),
        ("FusedDecoder.decode_step", "graph", "one program for each token"),
    ),
)


def text(x: float, y: float, words: str, size: int = 13, weight: str = "normal", anchor: str = "start") -> str:
    """Return a line of text."""
    style = f'font-size="{size}" font-weight="{weight}" text-anchor="{anchor}"'
    return f'<text x="{x:g}" y="{y:g}" {style}>{escape(words)}</text>'


def box(x: float, y: float, width: float, height: float, colour: str, name: str, about: str = "") -> Iterator[str]:
    """Yield a box with its name, and a line about it."""
    place = f'x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}"'
    yield f'<rect {place} rx="6" fill="{COLOURS[colour]}" stroke="#555555"/>'
    yield text(x + 12, y + 21, name, weight="bold")
    if about:
        yield text(x + 12, y + 39, about, size=12)


def arrow(x: float, y: float, x2: float, y2: float) -> str:
    """Return an arrow."""
    return f'<line x1="{x:g}" y1="{y:g}" x2="{x2:g}" y2="{y2:g}" stroke="#333333" marker-end="url(#head)"/>'


def rooms() -> Iterator[str]:
    """Draw the rooms, those that import above those that are imported."""
    x, y, width, height, step = 20, 70, 520, 50, 69
    yield text(x, 32, "Rooms", size=18, weight="bold")
    yield text(x, 54, "An arrow means: imports. A room imports those below it, never one above.")
    for number, (name, colour, about) in enumerate(ROOMS):
        top = y + number * step
        beside = colour in ("graph", "pruning", "metrics", "distributed")
        yield from box(x, top, width - 140 if beside else width, height, colour, name, about)
        if number + 1 < len(ROOMS):
            yield arrow(x + 190, top + height, x + 190, top + step - 2)
    first, last = y + 5 * step, y + 8 * step
    yield from box(x + width - 125, first, 125, last - step + height - first, "methods", "methods")
    rows = -(-len(METHODS) // 2)
    for number, name in enumerate(METHODS):
        column, row = divmod(number, rows)
        yield text(x + width - 115 + 58 * column, first + 42 + row * 16, name, size=10)
    yield arrow(x + width - 62, last - step + height, x + width - 62, last - 2)


def way() -> Iterator[str]:
    """Draw the way of a prompt, from the top down."""
    x, y, width, gap, height, step = 590, 104, 305, 20, 50, 86
    yield text(x, 32, "The way of a prompt", size=18, weight="bold")
    yield text(x, 54, "A colour is the room of a step; a wide box is a step of both ways.")
    lanes = x, x + width + gap
    for lane, name in zip(lanes, ("engine=eager", "engine=graph"), strict=True):
        yield text(lane + width / 2, 88, name, weight="bold", anchor="middle")
    for number, steps in enumerate(STEPS):
        for lane, drawn in zip(lanes, steps, strict=False):
            if drawn is not None:
                name, colour, about = drawn
                wide = 2 * width + gap if len(steps) == 1 else width
                yield from box(lane, y + number * step, wide, height, colour, name, about)
    for number, lane in enumerate(lanes):
        tops = [y + row * step for row, steps in enumerate(STEPS) if steps[number % len(steps)] is not None]
        for top, below in pairwise(tops):
            yield arrow(lane + width / 2, top + height, lane + width / 2, below - 2)


def picture() -> str:
    """Return the SVG."""
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" '
        'font-family="Helvetica, Arial, sans-serif" fill="#111111">',
        "<title>The rooms of the repository and the way of a prompt</title>",
        '<defs><marker id="head" markerWidth="9" markerHeight="8" refX="8" refY="4" orient="auto">'
        '<path d="M0,0 L9,4 L0,8 z" fill="#333333"/></marker></defs>',
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="#ffffff"/>',
    )
    return "\n".join((*head, *rooms(), *way(), "</svg>\n"))


if __name__ == "__main__":
    PICTURE.write_text(picture())
