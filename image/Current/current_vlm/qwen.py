"""The backbones of Qwen2.5-VL, Qwen3-VL and Qwen3.5.

Their towers compute what depends on the sizes of pictures in functions of the library, which ask the host; a graph of
them cannot.
"""

from dataclasses import replace
from typing import Any

from transformers import (
    Qwen2_5_VLForConditionalGeneration,
    Qwen2VLForConditionalGeneration,
    Qwen3_5ForConditionalGeneration,
    Qwen3_5MoeForConditionalGeneration,
)
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VLTextModel
from transformers.models.qwen2_vl.modeling_qwen2_vl import Qwen2VLTextModel
from transformers.models.qwen3_5.modeling_qwen3_5 import Qwen3_5TextModel
from transformers.models.qwen3_5_moe.modeling_qwen3_5_moe import Qwen3_5MoeTextModel

from current_vlm.placeholders import EncodingFirst
from qwen_vl_vtr import QwenBackbone
from qwen_vl_vtr.deepstack import DeepStackBackbone
from strategy import LayerSpec, register_backbone
from strategy.kernels.layer_spec import linear_spec


class Qwen25VLBackbone(EncodingFirst, QwenBackbone):
    """Qwen2.5-VL, and Qwen2-VL, whose decoder is the same since transformers 5."""

    name = "qwen2_5_vl"
    models = (Qwen2_5_VLForConditionalGeneration, Qwen2VLForConditionalGeneration)
    decoders = (Qwen2_5_VLTextModel, Qwen2VLTextModel)


class Qwen3VLBackbone(EncodingFirst, DeepStackBackbone):
    """Qwen3-VL, dense or with a mixture of experts."""


class Qwen35Backbone(EncodingFirst, QwenBackbone):
    """Qwen3.5, dense or with a mixture of experts: behind three linear layers follows one of attention with a gate."""

    name = "qwen3_5"
    models = (Qwen3_5ForConditionalGeneration, Qwen3_5MoeForConditionalGeneration)
    decoders = (Qwen3_5TextModel, Qwen3_5MoeTextModel)

    def layer_spec(self, layer: Any) -> LayerSpec:
        linear = layer.block_type == "linear_attention"
        spec = linear_spec(layer) if linear else replace(super().layer_spec(layer), query_gate=True)
        return replace(spec, norm="rms, weight + 1")


for _backbone in (Qwen25VLBackbone(), Qwen3VLBackbone(), Qwen35Backbone()):
    register_backbone(_backbone)
