"""Qwen3-VL's tiny decoder for the shared engine checks."""

import functools
from typing import Any

import pytest
import qwen_checks
import torch
from engine_checks import Family
from torch import Tensor
from transformers import (
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    Qwen3VLMoeConfig,
    Qwen3VLMoeForConditionalGeneration,
)
from transformers.models.qwen3_vl.configuration_qwen3_vl import Qwen3VLTextConfig
from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLTextModel

import qwen3_vl_vtr  # noqa: F401  registers the backbone

MORE = {
    "head_dim": 16,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]},
}


def deepstack(visual: Tensor, features: list[Tensor]) -> dict[str, Any]:
    return {"visual_pos_masks": visual, "deepstack_visual_embeds": features}


@pytest.fixture(scope="session")
def family() -> Family:
    return Family("qwen3_vl", "qwen3_0334", Qwen3VLTextModel, Qwen3VLTextConfig, MORE, deepstack)


class TinyQwen3:
    """A random Qwen3-VL with three DeepStack layers, dense or of experts, whose frames have time stamps."""

    stamp = 3

    def __init__(self, experts: bool) -> None:
        self.experts = experts

    @functools.cache  # noqa: B019  there are two, and they live as long as the tests
    def model(self, attention: str) -> Any:
        torch.manual_seed(0)
        text = qwen_checks.TEXT | MORE
        kind, kind_config = Qwen3VLForConditionalGeneration, Qwen3VLConfig
        if self.experts:
            kind, kind_config = Qwen3VLMoeForConditionalGeneration, Qwen3VLMoeConfig
            text |= {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
        config = kind_config(text_config=text, vision_config=qwen_checks.DEEPSTACK_VISION, **qwen_checks.TOKENS)
        return kind._from_config(config, attn_implementation=attention).eval()


@pytest.fixture(scope="session", params=[False, True], ids=["dense", "experts"])
def tiny(request: pytest.FixtureRequest) -> TinyQwen3:
    return TinyQwen3(request.param)
