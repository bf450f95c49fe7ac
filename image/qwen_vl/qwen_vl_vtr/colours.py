"""Pictures that stay bytes until their batch moves to the model's device, where the same steps make floats of them.

Floats take four times as much memory as colours, and a Qwen's picture is copied several times while patches are made
of it.
"""

from collections.abc import Callable
from copy import copy
from functools import wraps
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from transformers import BatchFeature

PIXELS = "pixel_values"
COLOURS = 3  # of a pixel, the first dimension of a patch


class ColourBatch(BatchFeature):
    """A prepared batch whose pixel values are bytes as long as nobody reads anything of it.

    Args:
        prepared: What the processor returned.
        to_floats: Returns the pixel values of bytes [patches, patch].
    """

    def __init__(self, prepared: BatchFeature, to_floats: Callable[[Tensor], Tensor]) -> None:
        self._prepared, self._to_floats = {**prepared}, to_floats

    @property
    def data(self) -> dict[str, Any]:
        """The batch as the processor makes it, with floats."""
        if self._prepared[PIXELS].dtype == torch.uint8:
            self._prepared[PIXELS] = self._to_floats(self._prepared[PIXELS])
        return self._prepared

    def __reduce__(self) -> Any:
        return BatchFeature, (self.data,)

    def to(self, *args: Any, **kwargs: Any) -> BatchFeature:
        """Return the batch on a device, in a type, or both; what moves is bytes."""
        moved = BatchFeature(self._prepared).to(*args, **kwargs)
        return BatchFeature(ColourBatch(moved, self._to_floats).data).to(*args, **kwargs)


def keep_bytes(processor: Any) -> None:
    """Have a Qwen's processor return a `ColourBatch` for RGB pictures.

    Args:
        processor: The processor; one whose image processor has no step of its own that makes floats is left as it is.
    """
    if hasattr(processor.image_processor, "rescale_and_normalize"):
        processor.__class__ = _keeping_bytes(type(processor))


def _keeping_bytes(kind: type) -> type:
    @wraps(kind.__call__)
    def prepare(self: Any, images: Any = None, *args: Any, **kwargs: Any) -> BatchFeature:
        if not images or not all(isinstance(each, Image.Image) and each.mode == "RGB" for each in images):
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
        # The step for pictures [B, 3, H, W] takes each patch as one of them.
        return ColourBatch(prepared, lambda flat: steps[0](flat.unflatten(1, (COLOURS, 1, -1))).flatten(1))

    return type(kind.__name__, (kind,), {"__call__": prepare})
