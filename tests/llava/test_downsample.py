"""Smaller pictures on LLaVA: the stock model with fewer patches, whose position codes are interpolated."""

import pytest
import torch
from lmms_checks import CHECKPOINTS
from PIL import Image

from llava.mm_utils import process_images
from llava.model.builder import load_pretrained_model


@pytest.fixture
def model():
    return load_pretrained_model(str(CHECKPOINTS / "shapes-llava"), device="cpu")[1]


def features(model, tower):
    picture = Image.effect_mandelbrot((200, 150), (-2, -1.5, 1, 1.5), 50).convert("RGB")
    return tower(process_images([picture], tower.image_processor, model.config))


@pytest.mark.parametrize(("tokens", "side"), [(192, 14), (64, 8), (1, 1)])
def test_there_are_as_many_tokens_as_nearest_fit(model, tokens, side):
    tower = model.get_vision_tower()
    before = tower.vision_tower.vision_model.embeddings.position_embedding.weight.clone()
    tower.downsample(tokens)
    assert tower.grid == (1, side, side)
    assert features(model, tower).shape[1] == side**2
    codes = tower.vision_tower.vision_model.embeddings.position_embedding.weight
    assert torch.equal(codes[0], before[0]), "the class token stands at no place"
    corners = before[1:].view(24, 24, -1)[[0, 0, -1, -1], [0, -1, 0, -1]]
    if side > 1:
        near = codes[1:].view(side, side, -1)[[0, 0, -1, -1], [0, -1, 0, -1]]
        assert (torch.cdist(near, corners).argmin(1) == torch.arange(4)).all()


def test_all_tokens_are_the_stock_model_and_more_are_refused(model):
    tower = model.get_vision_tower()
    stock = features(model, tower)
    with pytest.raises(ValueError, match=r"^downsample=650: the vision tower has 576 patches"):
        tower.downsample(650)
    tower.downsample(576)
    torch.testing.assert_close(features(model, tower), stock)
