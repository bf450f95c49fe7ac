"""Qwen2-VL's tiny decoder for the shared engine checks."""

import functools

import pytest
import qwen_checks
import torch
from engine_checks import Family
from transformers import Qwen2VLConfig, Qwen2VLForConditionalGeneration
from transformers.models.qwen2_vl.configuration_qwen2_vl import Qwen2VLTextConfig
from transformers.models.qwen2_vl.modeling_qwen2_vl import Qwen2VLTextModel

import qwen2_vl_vtr  # noqa: F401  registers the backbone

MORE = {"rope_scaling": {"type": "mrope", "mrope_section": [2, 3, 3]}}


@pytest.fixture(scope="session")
def family() -> Family:
    return Family("qwen2_vl", "qwen2_0334", Qwen2VLTextModel, Qwen2VLTextConfig, MORE)


class TinyQwen2:
    """A random Qwen2-VL, whose videos are frames without text between them."""

    stamp = 0

    @staticmethod
    @functools.cache
    def model(attention: str) -> Qwen2VLForConditionalGeneration:
        torch.manual_seed(0)
        vision = qwen_checks.VISION | {"depth": 2, "embed_dim": 32, "hidden_size": 32, "mlp_ratio": 2}
        text = qwen_checks.TEXT | MORE
        config = Qwen2VLConfig(text_config=text, vision_config=vision, **qwen_checks.TOKENS)
        return Qwen2VLForConditionalGeneration._from_config(config, attn_implementation=attention).eval()


@pytest.fixture(scope="session")
def tiny() -> TinyQwen2:
    return TinyQwen2()
