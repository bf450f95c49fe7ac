"""LLaVA's tiny decoder for the shared engine checks."""

import functools
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaModel
from transformers.cache_utils import DynamicCache

import llava  # noqa: F401  registers the backbone


class LlamaFamily:
    """A random Llama of 12 layers."""

    name = "llava"
    published = "llama_192"

    @staticmethod
    def build(config: dict[str, Any], attention: str) -> LlamaModel:
        return LlamaModel._from_config(LlamaConfig(**config), attn_implementation=attention).eval()

    @staticmethod
    @functools.cache
    def decoder(attention: str) -> LlamaModel:
        torch.manual_seed(0)
        config = {
            "vocab_size": 64,
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 12,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 256,
            "initializer_range": 0.15,
        }
        return LlamaFamily.build(config, attention)

    def cache(self) -> DynamicCache:
        return DynamicCache()

    def extra(self, visual: Tensor, features: list[Tensor]) -> dict[str, Any]:
        return {}

    @torch.no_grad()
    def run(
        self,
        decoder: LlamaModel,
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
        ).last_hidden_state


@pytest.fixture(scope="session")
def family() -> LlamaFamily:
    return LlamaFamily()
