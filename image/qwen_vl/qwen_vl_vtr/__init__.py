"""The backbone and the lmms-eval mixin that Qwen2-VL and Qwen3-VL share."""

from qwen_vl_vtr.backbone import QwenBackbone

__all__ = ["QwenBackbone"]
