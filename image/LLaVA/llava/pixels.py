"""Pixel values of pictures, those that CLIP's image processor computes, in a fraction of its time.

The processor of transformers 4.37 reads the metadata of installed packages in each of its steps and holds the lock of
the interpreter meanwhile, so that threads cannot prepare pictures beside each other. Its arithmetic on colours has only
256 results for each colour, which a table holds.
"""

from collections.abc import Iterable, Sequence
from functools import lru_cache
from itertools import groupby, islice
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from transformers import CLIPImageProcessor
from transformers.image_utils import ChannelDimension

from llava.resampling import resize

LARGEST = 1024  # pixels of the side of a picture that waits for the GPU; larger ones would take too much memory
AT_ONCE = 2**22  # pixels, before or behind, of pictures that are resized together; each takes 0.1 kB meanwhile


def fits(processor: Any) -> bool:
    """Return whether `pixel_values` computes what a processor does: CLIP's, with all of its steps."""
    steps = ("do_resize", "do_center_crop", "do_rescale", "do_normalize")
    if type(processor) is not CLIPImageProcessor or not all(getattr(processor, step) for step in steps):
        return False
    shortest = processor.size.get("shortest_edge")
    return shortest is not None and max(processor.crop_size.values()) <= shortest


def pixel_values(pictures: Sequence[Image.Image], processor: CLIPImageProcessor) -> Tensor:
    """Return the pixel values [count, 3, height, width] of RGB pictures, given a processor that `fits`."""
    table = _values_of_colours(*_steps(processor))
    size = processor.crop_size["height"], processor.crop_size["width"]
    values = np.empty((len(pictures), 3, *size), dtype=np.float32)
    for picture, own in zip(pictures, values, strict=True):
        colours = np.asarray(_resized(picture, processor))
        rows, columns = (_middle(*each) for each in zip(colours.shape, size, strict=False))
        for channel, of_channel in enumerate(own):
            np.take(table[channel], colours[rows, columns, channel], out=of_channel)
    return torch.from_numpy(values)


def can_wait(picture: Image.Image, processor: CLIPImageProcessor) -> bool:
    """Return whether `pixel_values_of_bytes` computes what `pixel_values` does, without taking much memory."""
    side, other = picture.size
    return side == other <= LARGEST and processor.resample == Image.Resampling.BICUBIC


def pixel_values_of_bytes(colours: Tensor, processor: CLIPImageProcessor) -> Tensor:
    """Return the pixel values [..., 3, height, width] of square pictures [..., side, side, 3] uint8, computed there."""
    side, size = processor.size["shortest_edge"], (processor.crop_size["height"], processor.crop_size["width"])
    rows, columns = (_middle(side, length) for length in size)
    seen = resize(colours.movedim(-1, -3), side)[..., rows, columns].flatten(-2).long()
    table = _values_on(colours.device, *_steps(processor)).expand(*seen.shape[:-1], -1)
    return table.gather(-1, seen).unflatten(-1, size)


def joined_pixel_values(images: Iterable[Tensor], processor: CLIPImageProcessor, device: torch.device) -> Tensor:
    """Return the pixel values [count, 3, height, width] of pictures on a device.

    Args:
        images: Pixel values [..., 3, height, width], or square pictures [side, side, 3] uint8.
        processor: Made the pixel values, or would have.
        device: Where bytes become pixel values.
    """
    found = []
    on_gpu = device.type == "cuda"  # elsewhere, copies that nobody waits for may be read before they are there
    for (shape, dtype), alike in groupby(images, lambda image: (image.shape, image.dtype)):
        count = max(1, AT_ONCE // max(shape[0], processor.size["shortest_edge"]) ** 2) if dtype == torch.uint8 else None
        while some := [*islice(alike, count)]:
            stack = torch.stack([image.to(device, non_blocking=on_gpu) for image in some])
            values = pixel_values_of_bytes(stack, processor) if dtype == torch.uint8 else stack
            found.append(values.flatten(0, -4))
    return torch.cat(found)


def _resized(picture: Image.Image, processor: CLIPImageProcessor) -> Image.Image:
    """Return a picture whose shorter side has the length that the processor wants."""
    short, wanted = min(picture.size), processor.size["shortest_edge"]
    size = tuple(wanted if side == short else int(wanted * side / short) for side in picture.size)
    return picture.resize((size[0], size[1]), resample=processor.resample)


def _middle(length: int, wanted: int) -> slice:
    """Return the part so long in the middle of a side."""
    start = (length - wanted) // 2
    return slice(start, start + wanted)


def _steps(processor: CLIPImageProcessor) -> tuple[float, tuple[float, ...], tuple[float, ...]]:
    """Return the numbers by which a processor makes values of colours."""
    return processor.rescale_factor, tuple(processor.image_mean), tuple(processor.image_std)


@lru_cache(maxsize=8)
def _values_on(device: torch.device, factor: float, mean: tuple[float, ...], std: tuple[float, ...]) -> Tensor:
    """Return `_values_of_colours` on a device."""
    return torch.from_numpy(_values_of_colours(factor, mean, std)).to(device)


@lru_cache(maxsize=8)
def _values_of_colours(factor: float, mean: tuple[float, ...], std: tuple[float, ...]) -> np.ndarray:
    """Return the value [3, 256] that the processor gives to each colour."""
    processor, layout = CLIPImageProcessor(), ChannelDimension.LAST
    colours = np.arange(256, dtype=np.uint8)[:, None, None].repeat(3, axis=2)
    rescaled = processor.rescale(colours, factor, input_data_format=layout)
    values = processor.normalize(rescaled, list(mean), list(std), input_data_format=layout)
    return np.ascontiguousarray(values[:, 0].T, dtype=np.float32)
