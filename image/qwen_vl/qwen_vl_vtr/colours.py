"""Pictures that stay bytes until their batch moves to the model's device, where the same steps make patches of them.

Patches of floats take eight times as much memory as the colours that they are made of, and making them takes a host
longer than reading a picture.
"""

from collections.abc import Callable, Mapping
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
    if all(hasattr(processor.image_processor, step) for step in ("_preprocess", "rescale_and_normalize")):
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
            # One by one, pictures stay in order, and their patches take the least memory.
            given.update(options, disable_grouping=True)
            made: BatchFeature = type(steps)._preprocess(own.image_processor, pictures, **given)
            return made

        def keep(colours: Tensor, *how: Any, **named: Any) -> Tensor:
            kept.extend(colours)
            return colours.to("meta")  # of which patches are made in no time

        own = copy(self)  # since threads may share a processor
        own.image_processor = copy(steps)
        own.image_processor._preprocess = make_patches
        own.image_processor.rescale_and_normalize = keep
        try:
            prepared = kind.__call__(own, images, *args, **kwargs)
        finally:
            # The step refers to what it is a step of, so both would wait for the garbage collector, with all colours.
            del own.image_processor._preprocess
        side = given["patch_size"]
        sizes = [(high * side, wide * side) for _, high, wide in prepared[GRIDS].tolist()]
        prepared[PIXELS] = pinned(torch.cat([colours.flatten() for colours in kept]))

        def to_floats(flat: Tensor) -> Tensor:
            parts = flat.split([COLOURS * high * wide for high, wide in sizes])
            pictures = [part.view(COLOURS, *size) for part, size in zip(parts, sizes, strict=True)]
            floats: Tensor = steps._preprocess(pictures, **given | {"do_resize": False})[PIXELS]
            return floats

        return ColourBatch(prepared, to_floats)

    return type(kind.__name__, (kind,), {"__call__": prepare})


def _are_rgb(images: Any) -> bool:
    """Return whether an argument is a list of RGB pictures, of which a processor makes bytes first."""
    are_pictures = isinstance(images, list) and bool(images) and all(isinstance(each, Image.Image) for each in images)
    return are_pictures and all(each.mode == "RGB" for each in images)
