"""Pictures that stay bytes until their batch moves to the model's device, where the same steps make patches of them.

Patches of floats take eight times as much memory as the colours that they are made of, and making them takes a host
longer than reading a picture.
"""

from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Mapping
from copy import copy
from functools import wraps
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from transformers import BatchFeature

from strategy.kernels.transfers import pinned

PIXELS = "pixel_values"
COLOURS = 3  # of a pixel
GRIDS = "image_grid_thw"
PATCHES, FLOATS = (
    "_preprocess",
    "rescale_and_normalize",
)  # steps of image processors, of which the first calls the second


class ColourBatch(BatchFeature):
    """A prepared batch whose pixel values are bytes until the batch moves, or until somebody looks at it.

    Args:
        prepared: What the processor returned.
        to_floats: Returns the pixel values [patches, patch] of the bytes of all pictures; None if there are no bytes.
    """

    def __init__(self, prepared: Mapping[str, Any], to_floats: Callable[[Tensor], Tensor] | None = None) -> None:
        super().__init__()
        self._state = {**prepared}, to_floats  # replaced as a whole, since threads may share a batch

    @property
    def data(self) -> dict[str, Any]:
        """The batch as the processor makes it, with floats."""
        held, to_floats = self._state
        if to_floats is not None:
            self._state = held, _ = held | {PIXELS: to_floats(held[PIXELS])}, None
        return held

    @data.setter
    def data(self, held: dict[str, Any]) -> None:
        self._state = held, None

    def __copy__(self) -> "ColourBatch":
        return ColourBatch(*self._state)

    def __reduce__(self) -> Any:
        return BatchFeature, (self.data,)

    def to(self, *args: Any, **kwargs: Any) -> BatchFeature:
        """Move the batch to a device, cast its floats to a type, or both, and return it; what moves is bytes."""
        held, to_floats = self._state
        if to_floats is not None:
            self._state = BatchFeature(held).to(*args, **kwargs).data, to_floats
        return super().to(*args, **kwargs)


def keep_bytes(processor: Any) -> None:
    """Have a Qwen's processor return a `ColourBatch` for a list of RGB pictures.

    Args:
        processor: The processor; one whose image processor has no steps of its own for tensors is left as it is.
    """
    if all(hasattr(processor.image_processor, step) for step in (PATCHES, FLOATS)):
        processor.__class__ = _keeping_bytes(type(processor))


def _keeping_bytes(kind: type) -> type:
    @wraps(kind.__call__)
    def prepare(self: Any, images: Any = None, *args: Any, **kwargs: Any) -> BatchFeature:
        if not _are_rgb(images) or kwargs.get("return_tensors") != "pt":
            prepared: BatchFeature = kind.__call__(self, images, *args, **kwargs)
            return prepared
        steps: Any = self.image_processor
        given: dict[str, Any] = {}
        kept: list[Tensor] = []

        def make_patches(pictures: list[Tensor], **options: Any) -> BatchFeature:
            given.update(options)
            made: BatchFeature = getattr(type(steps), PATCHES)(own.image_processor, pictures, **options)
            return made

        def keep(colours: Tensor, *how: Any, **named: Any) -> Tensor:
            kept.extend(colours)
            return colours.to("meta")  # of which patches are made in no time

        own = copy(self)  # since threads may share a processor
        own.image_processor = copy(steps)
        setattr(own.image_processor, PATCHES, make_patches)
        setattr(own.image_processor, FLOATS, keep)
        try:
            prepared = kind.__call__(own, images, *args, **kwargs)
        finally:
            # The step refers to what it is a step of, so both would wait for the garbage collector, with all colours.
            delattr(own.image_processor, PATCHES)
        side = given["patch_size"]
        sizes = [(high * side, wide * side) for _, high, wide in prepared[GRIDS].tolist()]
        prepared[PIXELS] = pinned(torch.cat([colours.flatten() for colours in _in_order(kept, sizes)]))
        kept.clear()

        def to_floats(flat: Tensor) -> Tensor:
            parts = flat.split([COLOURS * high * wide for high, wide in sizes])
            pictures = [part.view(COLOURS, *size) for part, size in zip(parts, sizes, strict=True)]
            # They have been resized; one by one, their patches take the least memory.
            others = {"do_resize": False, "disable_grouping": True}
            floats: Tensor = getattr(steps, PATCHES)(pictures, **given | others)[PIXELS]
            return floats

        return ColourBatch(prepared, to_floats)

    return type(kind.__name__, (kind,), {"__call__": prepare})


def _in_order(pictures: Iterable[Tensor], sizes: Iterable[tuple[int, int]]) -> list[Tensor]:
    """Return pictures [3, H, W], of which those of one size are in order, in the order of their sizes (H, W)."""
    waiting: dict[tuple[int, ...], deque[Tensor]] = defaultdict(deque)
    for picture in pictures:
        waiting[tuple(picture.shape[-2:])].append(picture)
    return [waiting[size].popleft() for size in sizes]


def _are_rgb(images: Any) -> bool:
    """Return whether an argument is a list of RGB pictures, of which a processor makes bytes first."""
    are_pictures = isinstance(images, list) and bool(images) and all(isinstance(each, Image.Image) for each in images)
    return are_pictures and all(each.mode == "RGB" for each in images)
