"""Qwen2-VL."""

from vllm.model_executor.models.qwen2_vl import Qwen2VLForConditionalGeneration

from vllm_vtr.models.pruned import Pruned


class PrunedQwen2VLForConditionalGeneration(Pruned, Qwen2VLForConditionalGeneration):
    """The stock model, pruned."""
