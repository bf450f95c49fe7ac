"""Qwen2-VL's tiny decoder for the shared engine checks."""

import functools
from typing import Any

import pytest
import qwen_checks
import torch
from torch import Tensor
from transformers import DynamicCache, Qwen2VLConfig, Qwen2VLForConditionalGeneration
from transformers.models.qwen2_vl.configuration_qwen2_vl import Qwen2VLTextConfig
from transformers.models.qwen2_vl.modeling_qwen2_vl import Qwen2VLTextModel

import qwen2_vl_vtr  # noqa: F401  registers the backbone

TEXT = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 12,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "rope_scaling": {"type": "mrope", "mrope_section": [2, 3, 3]},
    "max_position_embeddings": 256,
    "initializer_range": 0.15,
}


class Qwen2Family:
    """A random Qwen2-VL of 12 layers."""

    name = "qwen2_vl"
    published = "qwen2_0334"

    @staticmethod
    def build(config: dict[str, Any], attention: str) -> Qwen2VLTextModel:
        return Qwen2VLTextModel._from_config(Qwen2VLTextConfig(**config), attn_implementation=attention).eval()

    @staticmethod
    @functools.cache
    def decoder(attention: str) -> Qwen2VLTextModel:
        torch.manual_seed(0)
        return Qwen2Family.build(TEXT, attention)

    def cache(self) -> DynamicCache:
        return DynamicCache()

    def extra(self, visual: Tensor, features: list[Tensor]) -> dict[str, Any]:
        return {}

    @torch.no_grad()
    def run(
        self,
        decoder: Qwen2VLTextModel,
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
def family() -> Qwen2Family:
    return Qwen2Family()


class TinyQwen2:
    """A random Qwen2-VL, whose videos are frames without text between them."""

    stamp = 0

    @staticmethod
    @functools.cache
    def model(attention: str) -> Qwen2VLForConditionalGeneration:
        torch.manual_seed(0)
        vision = qwen_checks.VISION | {"depth": 2, "embed_dim": 32, "hidden_size": 32, "mlp_ratio": 2}
        text = qwen_checks.TEXT | {"rope_scaling": TEXT["rope_scaling"]}
        config = Qwen2VLConfig(text_config=text, vision_config=vision, **qwen_checks.TOKENS)
        return Qwen2VLForConditionalGeneration._from_config(config, attn_implementation=attention).eval()


@pytest.fixture(scope="session")
def tiny() -> TinyQwen2:
    return TinyQwen2()
