"""The backbones of Qwen2.5-VL and Qwen3-VL."""

from transformers import Qwen2_5_VLForConditionalGeneration, Qwen2VLForConditionalGeneration
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VLTextModel
from transformers.models.qwen2_vl.modeling_qwen2_vl import Qwen2VLTextModel

from current_vlm.placeholders import ENCODERS
from qwen_vl_vtr import QwenBackbone
from qwen_vl_vtr.deepstack import DeepStackBackbone
from strategy import register_backbone


class Qwen25VLBackbone(QwenBackbone):
    """Qwen2.5-VL, and Qwen2-VL, whose decoder is the same since transformers 5."""

    name = "qwen2_5_vl"
    models = (Qwen2_5_VLForConditionalGeneration, Qwen2VLForConditionalGeneration)
    decoders = (Qwen2_5_VLTextModel, Qwen2VLTextModel)
    encoder_methods = ENCODERS


class Qwen3VLBackbone(DeepStackBackbone):
    """Qwen3-VL, dense or with a mixture of experts."""

    encoder_methods = ENCODERS


register_backbone(Qwen25VLBackbone())
register_backbone(Qwen3VLBackbone())
