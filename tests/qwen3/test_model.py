"""Whole Qwen3-VL models."""

import pytest
from qwen_checks import *  # noqa: F403
from transformers import (
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    Qwen3VLMoeConfig,
    Qwen3VLMoeForConditionalGeneration,
)


@pytest.mark.parametrize(("depth", "layers"), [(28, (1, 10, 19)), (36, (1, 13, 24)), (64, (1, 23, 43))])
def test_default_layers_of_the_published_sizes(depth, layers):
    config = Qwen3VLConfig(text_config={"num_hidden_layers": depth})
    assert planned(Qwen3VLForConditionalGeneration, config) == layers  # noqa: F405


def test_default_layers_of_the_published_model_of_experts():
    config = Qwen3VLMoeConfig(text_config={"num_hidden_layers": 48})
    assert planned(Qwen3VLMoeForConditionalGeneration, config) == (1, 17, 32)  # noqa: F405
