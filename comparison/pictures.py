"""A question as one picture: what the model was shown, how its tokens were scored, and which were left."""

import io
import textwrap
from typing import Any

from matplotlib import rc_context
from matplotlib.figure import Figure

from comparison.watching import Look

PANELS = {
    "evolution": "spectral evolution",
    "attention": "attention of the last token",
    "score": "score",
}
SIZE = 2.1  # inches of a panel
ACROSS = 3  # panels of a single picture side by side
STYLE: dict[Any, Any] = {"font.size": 9, "text.parse_math": False}


def draw(pruned: Look, words: str = "") -> bytes:
    """A PNG of a look, under some words.

    One picture's panels stand in rows of three; those of several pictures, or of a video's frames, each in a row
    of its own, the frames side by side.
    """
    panels = _panels(pruned)
    frames = len(pruned.frames)
    columns = ACROSS if frames == 1 else frames
    rows = -(-len(panels) // ACROSS) if frames == 1 else len(panels)
    lines = [line for text in words.splitlines() for line in textwrap.wrap(text, 24 * columns)]
    with rc_context(STYLE):
        figure = Figure((SIZE * columns, (SIZE + 0.25) * rows + 0.17 * (len(lines) + 1)), layout="constrained")
        if lines:
            figure.suptitle("\n".join(lines), x=0.01, ha="left", fontsize=9)
        grid = figure.subplots(rows, columns, squeeze=False)
        for axes in grid.flat:
            axes.set_axis_off()
        for number, (title, layers) in enumerate(panels):
            for frame in range(frames):
                axes = grid.flat[number] if frames == 1 else grid[number, frame]
                _panel(axes, pruned.frames[frame], layers and layers[frame], title.startswith("left"))
                if frame == 0:
                    axes.set_title(title, fontsize=9, loc="left")
        file = io.BytesIO()
        figure.savefig(file, format="png", dpi=110, metadata={"Software": None})
    return file.getvalue()


def _panels(look: Look) -> list[tuple[str, Any]]:
    panels: list[tuple[str, Any]] = [("what the model is shown", None)]
    panels += [(title, look.maps[name]) for name, title in PANELS.items() if name in look.maps]
    for layer, stays in look.left:
        count = int(sum(frame.sum() for frame in stays))
        panels.append((f"left from layer {layer} on: {count}", stays))
    return panels


def _panel(axes: Any, frame: Any, values: Any, mask: bool) -> None:
    """The frame, with values [H, W] over it: as a heat map, or dark where a mask is 0."""
    width, height = frame.size
    extent = (0, width, height, 0)
    axes.imshow(frame, extent=extent)
    if values is None:
        return
    if mask:
        axes.imshow(1 - values.numpy(), cmap="gray_r", vmin=0, vmax=1, alpha=0.85 * (1 - values.numpy()), extent=extent)
    else:
        axes.imshow(values.numpy(), cmap="magma", alpha=0.75, extent=extent, interpolation="nearest")
