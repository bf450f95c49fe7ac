"""The backbone of Qwen2-VL."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import Qwen2VLForConditionalGeneration
from transformers.models.qwen2_vl.modeling_qwen2_vl import Qwen2VLTextModel

from qwen_vl_vtr import QwenBackbone
from strategy import register_backbone


class Qwen2VLBackbone(QwenBackbone):
    """Qwen2-VL, whose layers mix the rotary tables of time, row and column themselves."""

    name = "qwen2_vl"
    models = (Qwen2VLForConditionalGeneration,)
    decoders = (Qwen2VLTextModel,)

    size_methods = ("rot_pos_emb",)

    def rotary(self, layer: Any, kwargs: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
        return _mixed(layer, kwargs["position_embeddings"])

    def rotary_at(self, decoder: Any, positions: Tensor) -> tuple[Tensor, Tensor]:
        return _mixed(decoder.layers[0], super().rotary_at(decoder, positions))


def _mixed(layer: Any, tables: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Return a layer's rotary tables [B, L, D], whose sections alternate between time, row and column [3, B, L, D]."""
    sections = layer.self_attn.rope_scaling["mrope_section"] * 2
    cos, sin = (
        torch.cat([part[kind % 3] for kind, part in enumerate(table.split(sections, dim=-1))], dim=-1)
        for table in tables
    )
    return cos, sin


register_backbone(Qwen2VLBackbone())
