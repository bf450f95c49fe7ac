"""The backbones and the lmms-eval mixin that several backbones share."""

from qwen_vl_vtr.backbone import QwenBackbone
from qwen_vl_vtr.conditional_generation import ConditionalGenerationBackbone

__all__ = ["ConditionalGenerationBackbone", "QwenBackbone"]
