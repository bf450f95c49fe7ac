"""Marks of the clutter world: strokes, blots and scraps of unreadable text, which nobody asks about."""

import math
from collections.abc import Callable

import torch
from torch import Tensor

import glyphs
import world

STROKES, BLOTS, SCRAPS = 44, 16, 14  # of each in a picture
COLOURED = 3  # one stroke of so many has a colour that is asked about, so colour alone finds nothing
LENGTH, WIDTH = (8.0, 36.0), (1.0, 2.4)  # of a stroke, in pixels of the square picture
BLOT = (3.5, 9.0)  # radius
CELL = (1.7, 2.3)  # pixels of a cell of a scrap, as of tags and signs
INKED = 0.45  # share of a scrap's cells that have ink


def draw(canvas: Tensor, uniform: Callable[..., Tensor], palette: Tensor) -> Tensor:
    """Paint the marks on pictures [B, 3, H, W].

    Args:
        canvas: The pictures.
        uniform: Returns numbers for each picture as `uniform(low, high, *shape)`.
        palette: The colours [P, 3] that are asked about.
    """
    height, width = canvas.shape[2:]
    scale, device = world.scale_of((height, width)), canvas.device
    extent = torch.tensor([width, height], device=device)
    base = canvas.mean(dim=(2, 3))[:, None]

    def muted(count: int) -> Tensor:
        return (base + uniform(-0.3, 0.3, count, 1) + uniform(-0.06, 0.06, count, 3)).clamp(0, 1)

    def places(count: int, side: float) -> tuple[Tensor, Tensor, Tensor]:
        centre = uniform(0, 1, count, 2) * (extent - 1)
        xs, ys, points = world.squares(centre, 2 * math.ceil(side * scale / 2) + 4, device)
        return xs, ys, (points - centre[:, :, None, None]) / scale

    xs, ys, offset = places(SCRAPS, (3 * glyphs.WIDTH + 5) * CELL[1])
    plate, ink = _scraps(offset, uniform)
    tone = muted(SCRAPS)[..., None, None]
    dark = tone - torch.where(uniform(0, 1, SCRAPS, 1, 1, 1) < 0.5, -0.35, 0.35)
    canvas = world.paint(canvas, xs, ys, torch.lerp(tone, dark.clamp(0, 1), ink[:, :, None]), plate)

    xs, ys, offset = places(BLOTS, 2 * BLOT[1])
    radius, hollow = uniform(*BLOT, BLOTS, 1, 1), uniform(0, 1, BLOTS, 1, 1) < 0.4
    distance = offset.norm(dim=-1) - radius
    distance = torch.where(hollow, (distance + 1.5).abs() - 1.5, distance)
    canvas = world.paint(canvas, xs, ys, _filled(muted(BLOTS), xs), _cover(distance, scale))

    xs, ys, offset = places(STROKES, LENGTH[1])
    angle, half = uniform(0, math.pi, STROKES, 1, 1), uniform(*LENGTH, STROKES, 1, 1) / 2
    along = offset[..., 0] * angle.cos() + offset[..., 1] * angle.sin()
    across = offset[..., 1] * angle.cos() - offset[..., 0] * angle.sin()
    distance = torch.hypot((along.abs() - half).clamp(min=0), across) - uniform(*WIDTH, STROKES, 1, 1) / 2
    chosen = palette[(uniform(0, 1, STROKES) * len(palette)).long()]
    coloured = (torch.arange(STROKES, device=device) % COLOURED == 0)[:, None]
    colour = torch.where(coloured, chosen, muted(STROKES))
    return world.paint(canvas, xs, ys, _filled(colour, xs), _cover(distance, scale))


def _scraps(offset: Tensor, uniform: Callable[..., Tensor]) -> tuple[Tensor, Tensor]:
    """Return how much each pixel [B, O, S, S] shows of plates as large as tags or signs, and of their random ink."""
    count = offset.shape[1]
    cell = uniform(*CELL, count, 1, 1)
    columns = torch.where(uniform(0, 1, count, 1, 1) < 0.5, glyphs.WIDTH, 3 * glyphs.WIDTH + 2)
    u, v = offset[..., 0] / cell, offset[..., 1] / cell
    outside = torch.maximum(u.abs() - columns / 2 - 1.5, v.abs() - glyphs.HEIGHT / 2 - 1.5)
    drawn = (uniform(0, 1, count, glyphs.HEIGHT, 3 * glyphs.WIDTH + 2) < INKED).float()
    drawn[..., glyphs.WIDTH :: glyphs.WIDTH + 1] = 0  # gaps, as between letters
    text = (u.abs() < columns / 2) & (v.abs() < glyphs.HEIGHT / 2)
    column = (u + columns / 2).long().clamp(0, drawn.shape[-1] - 1)
    row = (v + glyphs.HEIGHT / 2).long().clamp(0, glyphs.HEIGHT - 1)
    ink = drawn.flatten(2).gather(2, (row * drawn.shape[-1] + column).flatten(2)).view_as(u)
    return _cover(outside * cell, 1.0), ink * text


def _cover(distance: Tensor, scale: float) -> Tensor:
    """Return how much of a pixel lies inside an outline at such a distance."""
    return (0.5 - distance * scale).clamp(0, 1)


def _filled(colour: Tensor, xs: Tensor) -> Tensor:
    """Return colours [B, O, 3] as squares of one colour each."""
    side = xs.shape[-1]
    return colour[..., None, None].expand(-1, -1, -1, side, side)
