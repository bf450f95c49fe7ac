"""The clutter world: small tags, signs and dots to read, compare and count among marks that mean nothing.

It has the functions of the shapes world, so that what makes questions and trains there does so here. Everything is
drawn from a seeded generator, in batches, on whatever device is asked for.
"""

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

# What both worlds share lies beside this folder; a script has only its own folder on the path.
sys.path.append(str(Path(__file__).parents[1] / "shapes"))

import glyphs
import marks
import world
from world import FIRST_TRAINING_SEED, NUMBERS, SIDE  # noqa: F401  the first is what a world has

COLOURS = {name: world.COLOURS[name] for name in ("red", "orange", "yellow", "green", "blue", "purple")}
DARK, LIGHT = 0.06, 0.97  # ink on light plates and on dark ones
DIGITS = tuple("0123456789")
# Each beginning with each ending: neither tells the word.
WORDS = tuple(first + rest for first in "cbp" for rest in ("at", "an", "ar", "ut"))
TEXTS = DIGITS + WORDS
KINDS = ("tag", "sign", "dot")  # with a digit, with a word, with nothing
BITMAPS = glyphs.bitmaps([text.upper() for text in TEXTS])
FAMILIES = ("number", "word", "larger", "place", "count")

TAGS, SIGNS, DOTS = 4, 3, 6  # the most of each in a scene; of dots, of each of two colours
SLOTS = (TAGS, SIGNS, 2 * DOTS)
# How many values the labels of a patch have, see `patch_labels`.
LABELS = {
    "shape": len(KINDS) + 1,
    "colour": len(COLOURS) + 1,
    "text": len(TEXTS) + 1,
    "place": len(world.PLACES) + 1,
    "centre": 2,
}
KIND = torch.tensor([kind for kind, slots in enumerate(SLOTS) for _ in range(slots)])
# On the picture of 336 x 336: the pixels of one cell of a letter, and of a dot's radius.
CELL = {"tag": (1.9, 2.3), "sign": (1.7, 2.0), "dot": (4.5, 6.5)}
MARGIN = 1.5  # cells between a text and the border of its plate
GAP = 3.0  # pixels between the circles around two things
SHOWN = 0.15  # share of a patch that a thing's box covers where the patch shows it


@dataclass(frozen=True)
class Scenes:
    """A batch of scenes; rows are scenes, columns things, those of KIND; absent things are False in `present`.

    colour: [B, O] indices into COLOURS; text: [B, O] indices into TEXTS, -1 for dots; centre: [B, O, 2] as (x, y) in
    pixels; cell: [B, O] pixels of a cell of a letter, or of a dot's radius; size: (height, width) of every picture.
    """

    size: tuple[int, int]
    present: Tensor
    colour: Tensor
    text: Tensor
    centre: Tensor
    cell: Tensor

    @property
    def extent(self) -> Tensor:
        """Half of the width and height [B, O, 2] of each thing's box, in pixels."""
        high = glyphs.HEIGHT + 2 * MARGIN
        plates = [(glyphs.width_of(text) + 2 * MARGIN, high) for text in ("0", "cat")]
        return self.cell[..., None] * torch.tensor([*plates, (2.0, 2.0)])[KIND] / 2


@dataclass(frozen=True)
class Question(world.Question):
    """A question, and the columns of the things that have to be seen to answer it."""

    things: tuple[int, ...] = ()


def sample_scenes(count: int, seed: int, size: tuple[int, int] = (SIDE, SIDE)) -> Scenes:
    """Draw `count` scenes of two to four tags, one to three signs and up to six dots of two colours, apart."""
    scale, generator, objects = world.scale_of(size), torch.Generator().manual_seed(seed), len(KIND)

    def uniform(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=generator)

    def whole(low: int, high: int, *shape: int) -> Tensor:
        return low + (uniform(*shape) * (high - low + 1)).long()

    def up_to(slots: int, low: int, high: int) -> Tensor:
        return torch.arange(slots) < whole(low, high, count, 1)

    wanted = [(TAGS, 2, TAGS), (SIGNS, 1, SIGNS), (DOTS, 0, DOTS), (DOTS, 0, DOTS)]
    present = torch.cat([up_to(*each) for each in wanted], dim=1)
    low, high = (torch.tensor([CELL[kind][end] for kind in KINDS])[KIND] for end in (0, 1))
    cell = scale * (low + (high - low) * uniform(count, objects))
    # Tags have different colours, and so have signs, and so have the two groups of dots.
    tags, signs, dots = (uniform(count, len(COLOURS)).argsort(dim=1)[:, :most] for most in (TAGS, SIGNS, 2))
    colour = torch.cat([tags, signs, dots.repeat_interleave(DOTS, dim=1)], dim=1)
    text = torch.cat(
        [
            whole(0, len(DIGITS) - 1, count, TAGS),
            len(DIGITS) + whole(0, len(WORDS) - 1, count, SIGNS),
            torch.full((count, 2 * DOTS), -1),
        ],
        dim=1,
    )
    scenes = Scenes(size, present, colour, text, torch.zeros(count, objects, 2), cell)
    centre, present = world.scatter(scenes.extent.norm(dim=-1), present, size, scale * GAP, generator)
    return Scenes(size, present, colour, text, centre, cell)


def render(scenes: Scenes, seed: int, device: torch.device | str = "cpu") -> Tensor:
    """Draw the scenes as [B, 3, H, W] float32 in [0, 1]: marks on a smooth ground, the things on them, and noise."""
    generator = torch.Generator(device).manual_seed(seed)

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        drawn = torch.rand(len(scenes.present), *shape, generator=generator, device=device)
        return low + (high - low) * drawn

    palette = torch.tensor(list(COLOURS.values()), device=device)
    canvas = marks.draw(world.ground(uniform, scenes.size, device), uniform, palette)
    side = 2 * int(scenes.extent.max().ceil()) + 4
    xs, ys, points = world.squares(scenes.centre, side, device)
    plate, ink = cover(scenes, points.flatten(2, 3))
    colour = palette[scenes.colour.to(device)] + uniform(-0.03, 0.03, len(KIND), 3)
    luminance = (colour * torch.tensor([0.299, 0.587, 0.114], device=device)).sum(-1)
    tone = torch.where(luminance > 0.5, DARK, LIGHT)[..., None, None, None]
    painted = torch.lerp(colour[..., None, None], tone, ink.view(*ink.shape[:2], 1, side, side))
    canvas = world.paint(canvas, xs, ys, painted, plate.view(*plate.shape[:2], side, side))
    noise = torch.randn(canvas.shape, generator=generator, device=device)
    return (canvas + 0.012 * noise).clamp(0, 1)


def cover(scenes: Scenes, points: Tensor) -> tuple[Tensor, Tensor]:
    """Return how much of the pixels at points [B, O, P, 2] each thing covers, and of that its ink, each [B, O, P]."""
    device = points.device
    offset = points - scenes.centre.to(device)[:, :, None]
    extent, cell = scenes.extent.to(device)[:, :, None], scenes.cell.to(device)[:, :, None]
    dot = _of_kind("dot").to(device)[:, None]
    distance = torch.where(dot, offset.norm(dim=-1) - cell, (offset.abs() - extent).amax(dim=-1))
    plate = (0.5 - distance).clamp(0, 1) * scenes.present.to(device)[:, :, None]
    table, text = BITMAPS.to(device), scenes.text.to(device)[:, :, None].clamp(min=0)
    # A bitmap has a border of one cell without ink, where everything outside of the text is looked up.
    centre = (glyphs.width_of("0") * _of_kind("tag") + glyphs.width_of("cat") * _of_kind("sign")).to(device)[
        :, None
    ] / 2 + 1
    ink = torch.zeros_like(plate)
    steps = (-1 / 3, 0.0, 1 / 3)  # nine samples a pixel
    for dx in steps:
        for dy in steps:
            u = ((offset[..., 0] + dx) / cell + centre).floor().long().clamp(0, table.shape[2] - 1)
            v = ((offset[..., 1] + dy) / cell + glyphs.HEIGHT / 2 + 1).floor().long().clamp(0, table.shape[1] - 1)
            ink = ink + table[text, v, u] / len(steps) ** 2
    return plate, torch.where(dot, 0, ink)


def _of_kind(kind: str) -> Tensor:
    return KINDS.index(kind) == KIND


def shares(scenes: Scenes, grid: tuple[int, int]) -> Tensor:
    """Return the share of each patch that each thing's box covers, [B, O, rows * columns]; 0 below SHOWN.

    A patch that holds a thing's centre has 2 more; absent things have 0.
    """
    share, holds = torch.ones(()), torch.ones((), dtype=torch.bool)
    for axis, cells in enumerate((grid[1], grid[0])):
        step = scenes.size[1 - axis] / cells
        edge = torch.arange(cells) * step
        middle, half = scenes.centre[..., axis, None], scenes.extent[..., axis, None]
        overlap = (torch.minimum(middle + half, edge + step) - torch.maximum(middle - half, edge)).clamp(min=0) / step
        shape = (*middle.shape[:2], 1, cells) if axis == 0 else (*middle.shape[:2], cells, 1)
        share = share * overlap.view(shape)
        holds = holds & ((middle >= edge) & (middle < edge + step)).view(shape)
    return ((torch.where(share >= SHOWN, share, 0) + 2 * holds) * scenes.present[:, :, None, None]).flatten(2)


def patch_labels(scenes: Scenes, grid: tuple[int, int]) -> dict[str, Tensor]:
    """What each patch of a (rows, columns) grid shows, as indices [B, rows * columns].

    centre: 1 where a thing's centre lies in the patch; shape (which of KINDS), colour, text, place: index + 1 of those
    of the thing that has its centre there, or else whose box covers most of the patch, SHOWN or more; 0 for the rest.
    """
    best, which = shares(scenes, grid).max(dim=1)
    values = {
        "shape": KIND.expand(len(best), -1),
        "colour": scenes.colour,
        "text": scenes.text,
        "place": world.cells(scenes),
    }
    labels = {name: torch.where(best > 0, each.gather(1, which) + 1, 0) for name, each in values.items()}
    return labels | {"centre": (best >= 2).long()}


def questions(scenes: Scenes, index: int) -> Iterator[Question]:
    """Every question that can be asked about one scene of the batch and has one right answer."""
    colours, where = tuple(COLOURS), world.places(scenes, index)
    text, colour = scenes.text[index].tolist(), [colours[each] for each in scenes.colour[index].tolist()]
    kinds = KIND.tolist()
    found = scenes.present[index].nonzero().flatten().tolist()
    tags, signs, dots = ([k for k in found if kinds[k] == kind] for kind in range(len(KINDS)))

    for k in tags:
        yield Question("number", f"What number is on the {colour[k]} tag?", TEXTS[text[k]], (k,))
    for k in signs:
        yield Question("word", f"What word is on the {colour[k]} sign?", TEXTS[text[k]], (k,))
    for one in tags:
        for other in tags:
            if text[one] != text[other]:
                larger = max(one, other, key=lambda k: text[k])
                asked = f"Which tag has the larger number, the {colour[one]} or the {colour[other]} one?"
                yield Question("larger", asked, colour[larger], (one, other))
    for k in tags + signs:
        if where[k] and [text[other] for other in tags + signs].count(text[k]) == 1:
            yield Question("place", f"Where is the {_named(text[k])}?", where[k], (k,))
    # Of the two colours that dots have, or would have, so that each number is as frequent.
    for name in dict.fromkeys(colour[TAGS + SIGNS :]):
        things = tuple(k for k in dots if colour[k] == name)
        yield Question("count", f"How many {name} dots are there?", NUMBERS[len(things)], things)


def _named(text: int) -> str:
    return f"{'number' if text < len(DIGITS) else 'word'} {TEXTS[text]}"
