"""LLaVA-1.5 in the format of transformers."""

from vllm.model_executor.models.llava import LlavaForConditionalGeneration

from vllm_vtr.models.pruned import Pruned


class PrunedLlavaForConditionalGeneration(Pruned, LlavaForConditionalGeneration):
    """The stock model, pruned."""
