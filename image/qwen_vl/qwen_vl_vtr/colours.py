"""Pictures that stay bytes until their batch moves to the model's device, where the same steps make floats of them.

Floats take four times as much memory as colours, and a Qwen's picture is copied several times while patches are made
of it.
"""

from collections.abc import Callable, Mapping
from copy import copy
from functools import wraps
from typing import Any

from PIL import Image
from torch import Tensor
from transformers import BatchFeature

from strategy.kernels.transfers import pinned

PIXELS = "pixel_values"
COLOURS = 3  # of a pixel, the first dimension of a patch


class ColourBatch(BatchFeature):
    """A prepared batch whose pixel values are bytes until the batch moves, or until somebody looks at it.

    Args:
        prepared: What the processor returned.
        to_floats: Returns the pixel values of bytes [patches, patch]; None if they are floats already.
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
        processor: The processor; one whose image processor has no step of its own that makes floats is left as it is.
    """
    if hasattr(processor.image_processor, "rescale_and_normalize"):
        processor.__class__ = _keeping_bytes(type(processor))


def _keeping_bytes(kind: type) -> type:
    @wraps(kind.__call__)
    def prepare(self: Any, images: Any = None, *args: Any, **kwargs: Any) -> BatchFeature:
        if not _are_rgb(images) or kwargs.get("return_tensors") != "pt":
            prepared: BatchFeature = kind.__call__(self, images, *args, **kwargs)
            return prepared
        make_floats, steps = self.image_processor.rescale_and_normalize, list[Callable[[Tensor], Tensor]]()

        def keep(colours: Tensor, *how: Any, **named: Any) -> Tensor:
            steps.append(lambda patches: make_floats(patches, *how, **named))
            return colours

        own = copy(self)  # since threads may share a processor
        own.image_processor = copy(self.image_processor)
        own.image_processor.rescale_and_normalize = keep
        prepared = kind.__call__(own, images, *args, **kwargs)
        prepared[PIXELS] = pinned(prepared[PIXELS])
        # The step for pictures [B, 3, H, W] takes each patch as one of them.
        return ColourBatch(prepared, lambda flat: steps[0](flat.unflatten(1, (COLOURS, 1, -1))).flatten(1))

    return type(kind.__name__, (kind,), {"__call__": prepare})


def _are_rgb(images: Any) -> bool:
    """Return whether an argument is a list of RGB pictures, of which a processor makes bytes first."""
    are_pictures = isinstance(images, list) and bool(images) and all(isinstance(each, Image.Image) for each in images)
    return are_pictures and all(each.mode == "RGB" for each in images)
