"""Qwen3-VL's tiny decoder for the shared engine checks."""

import functools
from typing import Any

import pytest
import qwen_checks
import torch
from torch import Tensor
from transformers import (
    DynamicCache,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    Qwen3VLMoeConfig,
    Qwen3VLMoeForConditionalGeneration,
)
from transformers.models.qwen3_vl.configuration_qwen3_vl import Qwen3VLTextConfig
from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLTextModel

import qwen3_vl_vtr  # noqa: F401  registers the backbone

TEXT = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 12,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]},
    "max_position_embeddings": 256,
    "initializer_range": 0.15,
}


class Qwen3Family:
    """A random Qwen3-VL of 12 layers."""

    name = "qwen3_vl"
    published = "qwen3_0334"

    @staticmethod
    def build(config: dict[str, Any], attention: str) -> Qwen3VLTextModel:
        return Qwen3VLTextModel._from_config(Qwen3VLTextConfig(**config), attn_implementation=attention).eval()

    @staticmethod
    @functools.cache
    def decoder(attention: str) -> Qwen3VLTextModel:
        torch.manual_seed(0)
        return Qwen3Family.build(TEXT, attention)

    def cache(self) -> DynamicCache:
        return DynamicCache()

    def extra(self, visual: Tensor, features: list[Tensor]) -> dict[str, Any]:
        return {"visual_pos_masks": visual, "deepstack_visual_embeds": features}

    @torch.no_grad()
    def run(
        self,
        decoder: Qwen3VLTextModel,
        embeddings: Tensor,
        mask: Tensor | None,
        positions: Tensor | None,
        cache: Any,
        extra: dict[str, Any] | None = None,
    ) -> Tensor:
        return decoder(
            inputs_embeds=embeddings,
            attention_mask=mask,
            position_ids=positions,
            past_key_values=cache,
            use_cache=cache is not None,
            **extra or {},
        ).last_hidden_state


@pytest.fixture(scope="session")
def family() -> Qwen3Family:
    return Qwen3Family()


class TinyQwen3:
    """A random Qwen3-VL with three DeepStack layers, dense or of experts, whose frames have time stamps."""

    stamp = 3

    def __init__(self, experts: bool) -> None:
        self.experts = experts

    @functools.cache  # noqa: B019  there are two, and they live as long as the tests
    def model(self, attention: str) -> Any:
        torch.manual_seed(0)
        vision = qwen_checks.VISION | {
            "depth": 3,
            "hidden_size": 32,
            "intermediate_size": 64,
            "out_hidden_size": 32,
            "num_position_embeddings": 64,
            "deepstack_visual_indexes": [0, 1, 2],
        }
        text = qwen_checks.TEXT | {"head_dim": 16, "rope_parameters": TEXT["rope_parameters"]}
        kind, kind_config = Qwen3VLForConditionalGeneration, Qwen3VLConfig
        if self.experts:
            kind, kind_config = Qwen3VLMoeForConditionalGeneration, Qwen3VLMoeConfig
            text |= {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
        config = kind_config(text_config=text, vision_config=vision, **qwen_checks.TOKENS)
        return kind._from_config(config, attn_implementation=attention).eval()


@pytest.fixture(scope="session", params=[False, True], ids=["dense", "experts"])
def tiny(request: pytest.FixtureRequest) -> TinyQwen3:
    return TinyQwen3(request.param)
