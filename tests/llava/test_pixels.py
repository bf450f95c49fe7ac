"""Pixel values are those of the library's image processor, bit for bit."""

from types import SimpleNamespace
from unittest.mock import patch

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from transformers import CLIPImageProcessor, ViTImageProcessor

from llava.mm_utils import prepare_pictures, process_images
from llava.pixels import LARGEST, can_wait, fits, joined_pixel_values, pixel_values, pixel_values_of_bytes

PROCESSORS = {
    "336": CLIPImageProcessor(size={"shortest_edge": 336}, crop_size={"height": 336, "width": 336}),
    "a smaller crop, another filter": CLIPImageProcessor(
        size={"shortest_edge": 40}, crop_size={"height": 32, "width": 24}, resample=Image.Resampling.BILINEAR
    ),
    "other values": CLIPImageProcessor(
        size={"shortest_edge": 28},
        crop_size={"height": 28, "width": 28},
        rescale_factor=1 / 127.5,
        image_mean=[0.5, 0.25, 1.0],
        image_std=[0.5, 0.3, 2.0],
    ),
}


@pytest.mark.parametrize("name", PROCESSORS)
@settings(max_examples=30, deadline=None)
@given(sizes=st.lists(st.tuples(st.integers(1, 700), st.integers(1, 700)), min_size=1, max_size=3), seed=st.integers(0))
def test_pixel_values_are_those_of_the_processor(name, sizes, seed):
    draw = np.random.default_rng(seed)
    pictures = [Image.fromarray(draw.integers(0, 256, (height, width, 3), dtype=np.uint8)) for width, height in sizes]
    # Beyond some ratio of sides a picture would have very many pixels.
    pictures = [each for each in pictures if max(each.size) <= 40 * min(each.size)]
    processor = PROCESSORS[name]
    assert fits(processor)
    for picture in pictures:
        expected = processor.preprocess(picture, return_tensors="pt", input_data_format="channels_last")
        torch.testing.assert_close(pixel_values([picture], processor), expected["pixel_values"], rtol=0, atol=0)
    assert len(pixel_values(pictures, processor)) == len(pictures)


def square(side, seed):
    draw = np.random.default_rng(seed)
    # Steps between black and white overshoot, and are cut off.
    colours = draw.integers(0, 256, (side, side, 3)) if seed % 2 else draw.integers(0, 2, (side, side, 3)) * 255
    return Image.fromarray(colours.astype(np.uint8))


def as_bytes(picture):
    return torch.from_numpy(np.array(picture))


@pytest.mark.parametrize("name", ["336", "other values"])
@settings(max_examples=60, deadline=None)
@given(side=st.integers(1, 60) | st.integers(1, LARGEST), seed=st.integers(0))
def test_the_model_computes_them_of_bytes(name, side, seed):
    picture, processor = square(side, seed), PROCESSORS[name]
    assert can_wait(picture, processor)
    assert torch.equal(pixel_values_of_bytes(as_bytes(picture), processor), pixel_values([picture], processor)[0])


@settings(max_examples=30, deadline=None)
@given(
    kinds=st.lists(st.sampled_from([(20, True), (20, False), (45, True)]), min_size=1, max_size=25),
    at_once=st.sampled_from([1, 5000, 2**22]),
)
def test_pictures_of_a_batch_are_computed_in_order(kinds, at_once):
    processor = PROCESSORS["other values"]
    pictures = [square(side, seed) for seed, (side, _) in enumerate(kinds)]
    values = [pixel_values([picture], processor) for picture in pictures]
    given = [
        as_bytes(picture) if waits else own[0] for picture, own, (_, waits) in zip(pictures, values, kinds, strict=True)
    ]
    with patch("llava.pixels.AT_ONCE", at_once):
        assert torch.equal(joined_pixel_values(given, processor, torch.device("cpu")), torch.cat(values))
    several = joined_pixel_values([torch.cat(values), values[0]], processor, torch.device("cpu"))
    assert torch.equal(several, torch.cat([*values, values[0]]))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
@pytest.mark.parametrize("side", [1, 40, 336, 337, 640, LARGEST])
def test_a_gpu_computes_them_of_bytes(side):
    picture, processor = square(side, 1), PROCESSORS["336"]
    there = pixel_values_of_bytes(as_bytes(picture).cuda(), processor)
    assert torch.equal(there.cpu(), pixel_values([picture], processor)[0])


@pytest.mark.parametrize("aspect", ["pad", "square"])
@pytest.mark.parametrize("processor", [*PROCESSORS.values(), CLIPImageProcessor(do_normalize=False)])
def test_square_pictures_that_are_not_too_large_wait_for_a_gpu(aspect, processor):
    config = SimpleNamespace(image_aspect_ratio=aspect)
    pictures = [square(50, 0), square(50, 1).resize((60, 40)), square(50, 2).resize((LARGEST + 1, LARGEST + 1))]
    waiting = fits(processor) and processor.resample == Image.Resampling.BICUBIC
    for device, expected in (("cuda", (waiting, waiting and aspect == "pad", False)), ("cpu", (False,) * 3)):
        prepared = prepare_pictures(pictures, processor, config, torch.device(device))
        assert tuple(each.dtype == torch.uint8 for each in prepared) == expected
        for picture, own, byte in zip(pictures, prepared, expected, strict=True):
            values = pixel_values_of_bytes(own, processor) if byte else own
            assert torch.equal(values, process_images([picture], processor, config)[0])
    assert prepare_pictures([], processor, config, torch.device("cpu")) == []


@pytest.mark.parametrize(
    "processor",
    [
        CLIPImageProcessor(do_center_crop=False),
        CLIPImageProcessor(do_normalize=False),
        CLIPImageProcessor(size={"height": 30, "width": 30}),
        CLIPImageProcessor(size={"shortest_edge": 30}, crop_size={"height": 30, "width": 31}),
        ViTImageProcessor(),
    ],
)
def test_another_processor_computes_them_itself(processor):
    assert not fits(processor)
