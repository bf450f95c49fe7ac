"""Whole Qwen2-VL models."""

import pytest
from qwen_checks import *  # noqa: F403
from transformers import Qwen2VLConfig, Qwen2VLForConditionalGeneration


@pytest.mark.parametrize(("depth", "layers"), [(28, (1, 10, 19)), (36, (1, 13, 24)), (80, (1, 29, 54))])
def test_default_layers_of_the_published_sizes(depth, layers):
    config = Qwen2VLConfig(text_config={"num_hidden_layers": depth})
    assert planned(Qwen2VLForConditionalGeneration, config) == layers  # noqa: F405
