"""The shapes world: random scenes, their pictures, and one-word questions with answers.

Everything is drawn from a seeded generator, in batches, on whatever device is asked for, so that a
training run can make its pictures on the GPU and never sees the same one twice.
"""

import math
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

COLOURS = {
    "red": (0.84, 0.12, 0.12),
    "orange": (0.95, 0.52, 0.08),
    "yellow": (0.95, 0.88, 0.15),
    "green": (0.13, 0.62, 0.20),
    "blue": (0.14, 0.28, 0.86),
    "purple": (0.55, 0.16, 0.68),
    "white": (0.97, 0.97, 0.97),
    "black": (0.05, 0.05, 0.05),
}
NUMBERS = ("none", "one", "two", "three", "four", "five", "six")
# The nine cells of a picture, row by row; what lies in a corner is not asked for, so one word is enough.
PLACES = (None, "top", None, "left", "centre", "right", None, "bottom", None)
FAMILIES = ("colour", "shape", "exists", "count", "place")

MAX_OBJECTS = 6
SIDE = 336  # pixels, of the square picture that the lengths below are given for; larger ones are alike, but larger
RADIUS = (22.0, 52.0)  # of the circle around an object
GAP = 6.0  # between two such circles
PLACE_MARGIN = 0.04  # of the side: how far from a cell's border an object must be to be asked for

# The test questions use seeds below this; training uses seeds from here on.
FIRST_TRAINING_SEED = 1_000_000


@dataclass(frozen=True)
class Scenes:
    """A batch of scenes; rows are scenes, columns objects, absent objects are False in `present`.

    shape, colour: [B, O] indices; centre: [B, O, 2] as (x, y) in pixels; radius in pixels, angle in
    radians: [B, O]; size: (height, width) in pixels of every picture.
    """

    size: tuple[int, int]
    present: Tensor
    shape: Tensor
    colour: Tensor
    centre: Tensor
    radius: Tensor
    angle: Tensor


@dataclass(frozen=True)
class Question:
    """One question about one scene, with its one-word answer and its family (see FAMILIES)."""

    family: str
    text: str
    answer: str


def sample_scenes(count: int, seed: int, size: tuple[int, int] = (SIDE, SIDE)) -> Scenes:
    """Draw `count` scenes of three to six objects that do not touch; the same seed, the same scenes."""
    scale = scale_of(size)
    generator = torch.Generator().manual_seed(seed)

    def uniform(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=generator)

    def attribute(choices: int) -> Tensor:
        # Half of the objects repeat an attribute of the one before, or nothing could be counted.
        values = (uniform(count, MAX_OBJECTS) * choices).long()
        repeats = uniform(count, MAX_OBJECTS) < 0.4
        for k in range(1, MAX_OBJECTS):
            values[:, k] = torch.where(repeats[:, k], values[:, k - 1], values[:, k])
        return values

    wanted = 3 + (uniform(count) * (MAX_OBJECTS - 2)).long()
    radius = scale * (RADIUS[0] + (RADIUS[1] - RADIUS[0]) * uniform(count, MAX_OBJECTS))
    present = torch.arange(MAX_OBJECTS) < wanted[:, None]
    centre, present = scatter(radius, present, size, scale * GAP, generator)
    angle = (uniform(count, MAX_OBJECTS) - 0.5) * 0.8
    return Scenes(size, present, attribute(len(SHAPES)), attribute(len(COLOURS)), centre, radius, angle)


def scale_of(size: tuple[int, int]) -> float:
    """Return how much larger than on a square picture everything is on a picture of a size."""
    return math.sqrt(size[0] * size[1]) / SIDE


def scatter(
    radius: Tensor, present: Tensor, size: tuple[int, int], gap: float, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Place objects at random so that the circles around them do not touch.

    Args:
        radius: [B, O] of the circles, in pixels.
        present: [B, O] which objects are wanted.
        size: Height and width of the pictures.
        gap: Pixels between two circles.
        generator: Draws the places.

    Returns:
        The centres [B, O, 2] as (x, y), and which objects [B, O] found a place.
    """
    count, objects = radius.shape
    extent = torch.tensor([size[1], size[0]], dtype=torch.float32)
    centre, present, rows = torch.zeros(count, objects, 2), present.clone(), torch.arange(count)
    for k in range(objects):
        r = radius[:, k, None, None]
        tries = r + torch.rand(count, 200, 2, generator=generator) * (extent - 2 * r)
        distance = (tries[:, :, None] - centre[:, None, :k]).norm(dim=-1)
        room = distance > (radius[:, k, None] + radius[:, :k] + gap)[:, None]
        free = (room | ~present[:, None, :k]).all(dim=-1)
        centre[:, k] = tries[rows, free.int().argmax(dim=-1)]
        present[:, k] &= free.any(dim=-1)
    return centre, present


def signed_distance(scenes: Scenes, points: Tensor) -> Tensor:
    """Distance in pixels of points [B, O, P, 2] to each object's outline, negative inside: [B, O, P]."""
    distance = torch.full(points.shape[:3], math.inf, device=points.device)
    for index, outline in enumerate(OUTLINES.values()):
        b, o = (scenes.present & (scenes.shape == index)).nonzero(as_tuple=True)
        centre, radius, angle = (
            values[b, o].to(points.device) for values in (scenes.centre, scenes.radius, scenes.angle)
        )
        b, o = b.to(points.device), o.to(points.device)
        x, y = ((points[b, o] - centre[:, None]) / radius[:, None, None]).unbind(-1)
        cos, sin = angle.cos()[:, None], angle.sin()[:, None]
        distance[b, o] = outline(x * cos + y * sin, y * cos - x * sin) * radius[:, None]
    return distance


def _star(x: Tensor, y: Tensor) -> Tensor:
    # Ten mirror images of one edge, from a tip at angle 0 to a notch at 36 degrees.
    fold, notch = math.pi / 5, 0.45
    along = torch.atan2(x, -y)
    along = along - 2 * fold * torch.round(along / (2 * fold))
    edge_x, edge_y = notch * math.sin(fold), 1 - notch * math.cos(fold)
    length = torch.hypot(x, y) / math.hypot(edge_x, edge_y)
    return length * (along.cos() * edge_x + along.abs().sin() * edge_y) - edge_x / math.hypot(edge_x, edge_y)


# Signed distance to each outline inside the unit circle, y pointing down.
OUTLINES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "circle": lambda x, y: torch.hypot(x, y) - 0.82,
    "square": lambda x, y: torch.maximum(x.abs(), y.abs()) - 0.74,
    "triangle": lambda x, y: torch.maximum(y, 0.866 * x.abs() - 0.5 * y) - 0.5,
    "star": _star,
    "cross": lambda x, y: torch.minimum(
        torch.maximum(x.abs() - 0.95, y.abs() - 0.3), torch.maximum(x.abs() - 0.3, y.abs() - 0.95)
    ),
    "ring": lambda x, y: (torch.hypot(x, y) - 0.7).abs() - 0.22,
}
SHAPES = tuple(OUTLINES)
# How many values the labels of a patch have, see `patch_labels`.
LABELS = {"shape": len(SHAPES) + 1, "colour": len(COLOURS) + 1, "place": len(PLACES) + 1, "centre": 2}


def render(scenes: Scenes, seed: int, device: torch.device | str = "cpu", frames: int = 1) -> Tensor:
    """Draw the scenes as [B, 3, H, W] float32 in [0, 1]: shaded objects on a smooth ground, with noise.

    Of every `frames` scenes in a row, the frames of a clip, ground and shades are the same.
    """
    generator = torch.Generator(device).manual_seed(seed)
    count = len(scenes.present)

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        drawn = torch.rand(count // frames, *shape, generator=generator, device=device)
        return (low + (high - low) * drawn).repeat_interleave(frames, dim=0)

    canvas = ground(uniform, scenes.size, device)
    # Each object is painted on a square around it.
    xs, ys, points = squares(scenes.centre, 2 * math.ceil(RADIUS[1] * scale_of(scenes.size)) + 4, device)
    side = xs.shape[-1]
    cover = (0.5 - signed_distance(scenes, points.flatten(2, 3))).clamp(0, 1).view(points.shape[:4])
    palette = torch.tensor(list(COLOURS.values()), device=device)
    objects = scenes.present.shape[1]
    colour = palette[scenes.colour.to(device)] + uniform(-0.03, 0.03, objects, 3)
    light = uniform(-0.28, 0.28, objects, 2, 1, 1)
    offset = torch.arange(side, device=device) - side // 2
    shade = 1 + (light[:, :, 0] * offset + light[:, :, 1] * offset[:, None]) / side
    canvas = paint(canvas, xs, ys, colour[..., None, None] * shade[:, :, None], cover)
    noise = torch.randn(canvas.shape, generator=generator, device=device)
    return (canvas + 0.012 * noise).clamp(0, 1)


def ground(uniform: Callable[..., Tensor], size: tuple[int, int], device: torch.device | str) -> Tensor:
    """Draw smooth grounds [B, 3, H, W] with `uniform(low, high, *shape)`, which draws numbers for each picture."""
    y, x = (torch.linspace(-1, 1, side, device=device) for side in size)
    y = y[:, None]
    # Muted greys and pastels: no ground is as saturated, as light or as dark as an object.
    colour = uniform(0.38, 0.66, 1, 1, 1) + uniform(-0.07, 0.07, 3, 1, 1)
    slope, wave = uniform(-0.08, 0.08, 2, 1, 1, 1), uniform(-2.5, 2.5, 3, 1, 1, 1)
    colour = colour + slope[:, 0] * x + slope[:, 1] * y
    return colour + 0.04 * torch.sin(wave[:, 0] * x + wave[:, 1] * y + 2 * wave[:, 2])


def squares(centre: Tensor, side: int, device: torch.device | str) -> tuple[Tensor, Tensor, Tensor]:
    """Return the columns and rows [B, O, side] of squares around centres [B, O, 2], and their pixels' middles."""
    offset = torch.arange(side, device=device) - side // 2
    corner = centre.to(device).floor().long()
    xs, ys = corner[..., :1] + offset, corner[..., 1:] + offset
    return xs, ys, torch.stack(torch.broadcast_tensors(xs[:, :, None, :], ys[:, :, :, None]), dim=-1) + 0.5


def paint(canvas: Tensor, xs: Tensor, ys: Tensor, colour: Tensor, cover: Tensor) -> Tensor:
    """Paint objects one after the other on pictures [B, 3, H, W], each on its square, which may stick out.

    colour: [B, O, 3, side, side]; cover: [B, O, side, side], 0 where the object leaves a pixel as it is.
    """
    border = xs.shape[-1]
    canvas = torch.nn.functional.pad(canvas, (border,) * 4)
    rows = torch.arange(len(canvas), device=canvas.device)[:, None, None, None]
    channels = torch.arange(3, device=canvas.device)[:, None, None]
    for k in range(xs.shape[1]):
        where = (rows, channels, ys[:, k, None, :, None] + border, xs[:, k, None, None, :] + border)
        canvas[where] = torch.lerp(canvas[where], colour[:, k], cover[:, k, None])
    return canvas[:, :, border:-border, border:-border]


def patch_labels(scenes: Scenes, grid: tuple[int, int], **more: Tensor) -> dict[str, Tensor]:
    """What each patch of a (rows, columns) grid shows, as indices [B, rows * columns].

    centre: 1 where an object's centre lies in the patch; shape, colour, place and whatever `more` says of
    the objects, [B, O]: index + 1 of those of the object that has its centre there (a ring's is a hole) or
    else covers the patch's middle, 0 for the ground.
    """
    step_y, step_x = scenes.size[0] / grid[0], scenes.size[1] / grid[1]
    y, x = torch.meshgrid(torch.arange(grid[0]) + 0.5, torch.arange(grid[1]) + 0.5, indexing="ij")
    points = torch.stack([x * step_x, y * step_y], dim=-1).flatten(0, 1)
    inside = (signed_distance(scenes, points.expand(*scenes.present.shape, -1, 2)) < 0).float()
    column, row = (scenes.centre[..., 0] / step_x).long(), (scenes.centre[..., 1] / step_y).long()
    middle = torch.nn.functional.one_hot(row * grid[1] + column, grid[0] * grid[1])
    weight = inside + 2 * middle * scenes.present[:, :, None]
    best, which = weight.max(dim=1)
    known = {"shape": scenes.shape, "colour": scenes.colour, "place": cells(scenes)} | more
    labels = {name: torch.where(best > 0, values.gather(1, which) + 1, 0) for name, values in known.items()}
    return labels | {"centre": (best >= 2).long()}


def questions(scenes: Scenes, index: int) -> Iterator[Question]:
    """Every question that can be asked about one scene of the batch and has one right answer."""
    colours = tuple(COLOURS)
    where = places(scenes, index)
    objects = [
        (SHAPES[int(scenes.shape[index, k])], colours[int(scenes.colour[index, k])], where[k])
        for k in scenes.present[index].nonzero().flatten().tolist()
    ]
    pairs = [(shape, colour) for shape, colour, _ in objects]
    by_shape = {name: [colour for shape, colour in pairs if shape == name] for name in SHAPES}
    by_colour = {name: [shape for shape, colour in pairs if colour == name] for name in colours}
    place_of = {(shape, colour): place for shape, colour, place in objects if place}

    yield Question("count", "How many objects are there?", NUMBERS[len(objects)])
    for shape, found in by_shape.items():
        yield Question("count", f"How many {plural(shape)} are there?", NUMBERS[len(found)])
        if len(found) == 1:
            yield Question("colour", f"What colour is the {shape}?", found[0])
            if (shape, found[0]) in place_of:
                yield Question("place", f"Where is the {shape}?", place_of[shape, found[0]])
    for colour, found in by_colour.items():
        yield Question("count", f"How many {colour} objects are there?", NUMBERS[len(found)])
        if len(found) == 1:
            yield Question("shape", f"What shape is the {colour} object?", found[0])
            if (found[0], colour) in place_of:
                yield Question("place", f"Where is the {colour} object?", place_of[found[0], colour])
    for shape in SHAPES:
        for colour in colours:
            # A pair that shares nothing with the scene could be refused without looking for the pair.
            if by_shape[shape] or by_colour[colour]:
                answer = "yes" if (shape, colour) in pairs else "no"
                article = "an" if colour == "orange" else "a"
                yield Question("exists", f"Is there {article} {colour} {shape}?", answer)


def choose(candidates: list[Question], count: int, rng: random.Random) -> list[Question]:
    """Pick `count` distinct questions, families and then answers in equal shares as far as they last."""
    left: dict[str, dict[str, list[Question]]] = {}
    for question in candidates:
        left.setdefault(question.family, {}).setdefault(question.answer, []).append(question)
    chosen: list[Question] = []
    while left and len(chosen) < count:
        family = rng.choice(list(left))
        answer = rng.choice(list(left[family]))
        pool = left[family][answer]
        chosen.append(pool.pop(rng.randrange(len(pool))))
        if not pool:
            del left[family][answer]
        if not left[family]:
            del left[family]
    return chosen


def plural(shape: str) -> str:
    """The plural of a shape's name."""
    return shape + ("es" if shape.endswith("s") else "s")


def _thirds(scenes: Scenes) -> Tensor:
    """Where the centres lie, [B, O, 2] as (column, row) in thirds of the picture: 0 to 3."""
    return scenes.centre / torch.tensor([scenes.size[1], scenes.size[0]]) * 3


def cells(scenes: Scenes) -> Tensor:
    """Return the index [B, O] into PLACES, read row by row, of each object's centre."""
    column, row = _thirds(scenes).long().clamp(0, 2).unbind(-1)
    return row * 3 + column


def places(scenes: Scenes, index: int) -> list[str | None]:
    """Return the place of each object of a scene, None in a corner or too near to a border between cells."""
    margin = (_thirds(scenes)[index, :, None] - torch.tensor([[1.0], [2.0]])).abs().amin(dim=(1, 2))
    found = cells(scenes)[index].tolist()
    return [PLACES[cell] if far else None for cell, far in zip(found, margin >= 3 * PLACE_MARGIN, strict=True)]
