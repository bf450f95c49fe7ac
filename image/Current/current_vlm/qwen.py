"""The backbones of Qwen2.5-VL, Qwen3-VL and Qwen3.5.

Their towers compute what depends on the sizes of pictures in functions of the library, which ask the host; a graph of
them cannot.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from torch import Tensor
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
from transformers.vision_utils import get_vision_window_index

from current_vlm.placeholders import EncodingFirst
from qwen_vl_vtr import QwenBackbone
from qwen_vl_vtr.deepstack import DeepStackBackbone
from strategy import LayerSpec, register_backbone
from strategy.backbone import EncoderSpec
from strategy.kernels.layer_spec import linear_spec


class Qwen25VLBackbone(EncodingFirst, QwenBackbone):
    """Qwen2.5-VL, and Qwen2-VL, whose decoder is the same since transformers 5."""

    name = "qwen2_5_vl"
    models = (Qwen2_5_VLForConditionalGeneration, Qwen2VLForConditionalGeneration)
    decoders = (Qwen2_5_VLTextModel, Qwen2VLTextModel)

    def pieces(self, module: Any, arguments: Mapping[str, Any]) -> Sequence[int] | None:
        return None if hasattr(module, "window_size") else super().pieces(module, arguments)

    def encoder(self, model: Any) -> EncoderSpec | None:
        spec, tower = super().encoder(model), model.model.visual
        if spec is None or not hasattr(tower, "window_size"):  # Qwen2-VL's has no windows
            return spec
        return spec._replace(order=(tower, partial(_order_of_windows, tower)))


def _order_of_windows(tower: Any, kwargs: Mapping[str, Any]) -> Tensor:
    """Return where each visual token stands in the order of the windows, in which Qwen2.5-VL's layers see them."""
    windows, _ = get_vision_window_index(
        kwargs["grid_thw"], tower.spatial_merge_size, tower.window_size, tower.patch_size
    )
    return windows.argsort()


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
