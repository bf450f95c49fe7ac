"""The shapes world in motion: short clips of objects that appear and move, and one-word questions about them."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

import world

SIDE = 224
FRAMES = 8  # that the model sees, evenly spaced over a clip
DIRECTIONS = {"right": (1.0, 0.0), "left": (-1.0, 0.0), "down": (0.0, 1.0), "up": (0.0, -1.0)}
FAMILIES = ("direction", "colour", "shape", "count", "first")
MAX_OBJECTS = 4
WAY = (0.35, 0.5)  # how far an object moves while the clip lasts, as a share of the side
# Later objects come after the first one, and early enough to be seen moving: as shares of the clip.
LATER = (0.25, 0.5)


@dataclass(frozen=True)
class Clips:
    """A batch of clips; rows are clips, columns objects.

    scenes: what each frame shows, the frames of a clip in a row, [B * frames, O]. present: objects there
    are, [B, O]; the first one is there from the start. heading: index [B, O] into DIRECTIONS.
    """

    scenes: world.Scenes
    present: Tensor
    heading: Tensor
    frames: int

    def render(self, seed: int, device: torch.device | str = "cpu") -> Tensor:
        """The frames as [B, frames, 3, SIDE, SIDE] float32 in [0, 1]."""
        return world.render(self.scenes, seed, device, self.frames).unflatten(0, (-1, self.frames))


def sample_clips(count: int, seed: int, frames: int = FRAMES) -> Clips:
    """Draw `count` clips of two to four objects whose ways never cross; the same seed, the same clips."""
    generator = torch.Generator().manual_seed(seed)

    def uniform(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=generator)

    scale, tries = SIDE / world.SIDE, 300
    low, high = (scale * radius for radius in world.RADIUS)
    wanted = 2 + (uniform(count) * (MAX_OBJECTS - 1)).long()
    radius = low + (high - low) * 0.8 * uniform(count, MAX_OBJECTS)
    ways = torch.tensor(list(DIRECTIONS.values()))
    heading = (uniform(count, MAX_OBJECTS) * len(ways)).long()
    step = ways[heading] * (WAY[0] + (WAY[1] - WAY[0]) * uniform(count, MAX_OBJECTS, 1)) * SIDE
    at = torch.linspace(0, 1, frames)
    moved = step[:, :, None] * at[:, None]  # [B, O, frames, 2]
    path = torch.zeros(count, MAX_OBJECTS, frames, 2)
    present = torch.arange(MAX_OBJECTS) < wanted[:, None]
    rows = torch.arange(count)
    for k in range(MAX_OBJECTS):
        r = radius[:, k, None, None]
        # A start from which the whole way stays inside the picture.
        start_low = r - step[:, k, None].clamp(max=0)
        start_high = SIDE - r - step[:, k, None].clamp(min=0)
        start = start_low + uniform(count, tries, 2) * (start_high - start_low)
        tried = start[:, :, None] + moved[:, k, None]  # [B, tries, frames, 2]
        distance = (tried[:, :, None] - path[:, None, :k]).norm(dim=-1).amin(dim=-1)
        room = distance > (radius[:, k, None] + radius[:, :k] + scale * world.GAP)[:, None]
        free = (room | ~present[:, None, :k]).all(dim=-1)
        path[:, k] = tried[rows, free.int().argmax(dim=-1)]
        present[:, k] &= free.any(dim=-1)
    appears = LATER[0] + (LATER[1] - LATER[0]) * uniform(count, MAX_OBJECTS)
    appears[:, 0] = 0
    shown = present[:, None] & (appears[:, None] <= at[:, None])  # [B, frames, O]

    def every_frame(values: Tensor) -> Tensor:
        return values.repeat_interleave(frames, dim=0)

    scenes = world.Scenes(
        size=(SIDE, SIDE),
        present=shown.flatten(0, 1),
        shape=every_frame((uniform(count, MAX_OBJECTS) * len(world.SHAPES)).long()),
        colour=every_frame((uniform(count, MAX_OBJECTS) * len(world.COLOURS)).long()),
        centre=path.transpose(1, 2).flatten(0, 1),
        radius=every_frame(radius),
        angle=every_frame((uniform(count, MAX_OBJECTS) - 0.5) * 0.8),
    )
    return Clips(scenes, present, heading, frames)


def questions(clips: Clips, index: int) -> Iterator[world.Question]:
    """Every question that can be asked about one clip of the batch and has one right answer."""
    colours, ways, row = tuple(world.COLOURS), tuple(DIRECTIONS), index * clips.frames
    objects = [
        (
            world.SHAPES[int(clips.scenes.shape[row, k])],
            colours[int(clips.scenes.colour[row, k])],
            ways[int(clips.heading[index, k])],
        )
        for k in clips.present[index].nonzero().flatten().tolist()
    ]
    yield world.Question("count", "How many objects are there?", world.NUMBERS[len(objects)])
    yield world.Question("first", "Which shape appears first?", objects[0][0])
    for shape in world.SHAPES:
        found = [(colour, way) for name, colour, way in objects if name == shape]
        yield world.Question("count", f"How many {world.plural(shape)} are there?", world.NUMBERS[len(found)])
        if len(found) == 1:
            yield world.Question("colour", f"What colour is the {shape}?", found[0][0])
            yield world.Question("direction", f"Which way does the {shape} move?", found[0][1])
    for colour in colours:
        found = [(name, way) for name, own, way in objects if own == colour]
        if len(found) == 1:
            yield world.Question("shape", f"What shape is the {colour} object?", found[0][0])
            yield world.Question("direction", f"Which way does the {colour} object move?", found[0][1])
