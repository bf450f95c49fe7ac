"""A question as one picture: what the model was shown, how its tokens were scored, and which were kept."""

import io
import textwrap
from typing import Any, NamedTuple

from matplotlib import rc_context
from matplotlib.figure import Figure

from comparison.inspection import Inspection, Maps

PANELS = {
    "evolution": "spectral evolution",
    "attention": "attention of the last token",
    "score": "score",
}
SIZE = 2.1  # inches of a panel
ACROSS = 3  # panels of a single picture side by side
STYLE: dict[Any, Any] = {"font.size": 9, "text.parse_math": False}


class _Panel(NamedTuple):
    """A row or a cell of the picture.

    maps: Values [H, W] for each frame; None for the frames alone. is_mask: Whether they say which tokens were kept.
    """

    title: str
    maps: Maps | None = None
    is_mask: bool = False


def draw(inspection: Inspection, caption: str = "") -> bytes:
    """Draw an inspection, and return a PNG with a caption above.

    The panels of a single picture stand in rows of three. Those of several pictures, or of a video's frames, have a row
    each, with the frames side by side.
    """
    panels = _panels(inspection)
    frames = inspection.frames
    columns = ACROSS if len(frames) == 1 else len(frames)
    rows = -(-len(panels) // ACROSS) if len(frames) == 1 else len(panels)
    lines = [line for text in caption.splitlines() for line in textwrap.wrap(text, 24 * columns)]
    with rc_context(STYLE):
        figure = Figure((SIZE * columns, (SIZE + 0.25) * rows + 0.17 * (len(lines) + 1)), layout="constrained")
        if lines:
            figure.suptitle("\n".join(lines), x=0.01, ha="left", fontsize=9)
        grid = figure.subplots(rows, columns, squeeze=False)
        for axes in grid.flat:
            axes.set_axis_off()
        for number, panel in enumerate(panels):
            for position, frame in enumerate(frames):
                axes = grid.flat[number] if len(frames) == 1 else grid[number, position]
                _draw_panel(axes, frame, panel.maps and panel.maps[position], panel.is_mask)
                if position == 0:
                    axes.set_title(panel.title, fontsize=9, loc="left")
        file = io.BytesIO()
        figure.savefig(file, format="png", dpi=110, metadata={"Software": None})
    return file.getvalue()


def _panels(inspection: Inspection) -> list[_Panel]:
    panels = [_Panel("what the model is shown")]
    panels += [_Panel(title, inspection.maps[name]) for name, title in PANELS.items() if name in inspection.maps]
    for layer, masks in inspection.kept:
        count = int(sum(float(mask.sum()) for mask in masks))
        panels.append(_Panel(f"left from layer {layer} on: {count}", masks, is_mask=True))
    return panels


def _draw_panel(axes: Any, frame: Any, values: Any, is_mask: bool) -> None:
    """Draw a frame, with values [H, W] over it: as a heat map, or dark where a mask is 0."""
    width, height = frame.size
    extent = (0, width, height, 0)
    axes.imshow(frame, extent=extent)
    if values is None:
        return
    if is_mask:
        axes.imshow(1 - values.numpy(), cmap="gray_r", vmin=0, vmax=1, alpha=0.85 * (1 - values.numpy()), extent=extent)
    else:
        axes.imshow(values.numpy(), cmap="magma", alpha=0.75, extent=extent, interpolation="nearest")
