"""What the tests of both backbones on transformers 4.37's Llama share."""

from typing import Any

import pytest
from engine_checks import Family, flash_stand_in
from torch import Tensor
from transformers import LlamaConfig, LlamaModel
from transformers.models.llama.modeling_llama import LlamaFlashAttention2


def use_flash(decoder: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a decoder think it has flash attention."""

    def forward(module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, *_: Any, **__: Any) -> Tensor:
        return flash_stand_in(*(x.transpose(1, 2) for x in (query, key, value)), mask)

    monkeypatch.setattr(LlamaFlashAttention2, "_flash_attention_forward", forward)
    for layer in decoder.layers:
        layer.self_attn.__class__ = LlamaFlashAttention2
    decoder._use_flash_attention_2, decoder._use_sdpa = True, False
    decoder.config._attn_implementation = "flash_attention_2"


def llama(name: str, published: str) -> Family:
    """A family of that name."""
    return Family(name, published, LlamaModel, LlamaConfig, flash=use_flash)
