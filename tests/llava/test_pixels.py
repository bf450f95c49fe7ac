"""Pixel values are those of the library's image processor, bit for bit."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from transformers import CLIPImageProcessor, ViTImageProcessor

from llava.pixels import fits, pixel_values

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
