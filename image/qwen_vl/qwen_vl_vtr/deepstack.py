"""The backbone of Qwen3-VL, whatever the version of transformers."""

from typing import Any

from torch import Tensor
from transformers import Qwen3VLForConditionalGeneration, Qwen3VLMoeForConditionalGeneration
from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLTextModel
from transformers.models.qwen3_vl_moe.modeling_qwen3_vl_moe import Qwen3VLMoeTextModel

from qwen_vl_vtr.backbone import QwenBackbone


class DeepStackBackbone(QwenBackbone):
    """Qwen3-VL, dense or with a mixture of experts, which adds DeepStack features after its first layers."""

    name = "qwen3_vl"
    models = (Qwen3VLForConditionalGeneration, Qwen3VLMoeForConditionalGeneration)
    decoders = (Qwen3VLTextModel, Qwen3VLMoeTextModel)

    def added_features(self, kwargs: dict[str, Any]) -> list[Tensor]:
        features, visual = kwargs.pop("deepstack_visual_embeds", None), kwargs.pop("visual_pos_masks", None)
        return [
            part.new_zeros(*visual.shape, part.shape[-1]).masked_scatter(visual[..., None].to(part.device), part)
            for part in features or []
        ]
