"""Qwen3-VL, whose first layers are followed by features of the vision tower (DeepStack)."""

from torch import Tensor
from vllm.model_executor.models.qwen3_vl import Qwen3VLForConditionalGeneration

from vllm_vtr.models.pruned import Pruned


class PrunedQwen3VLForConditionalGeneration(Pruned, Qwen3VLForConditionalGeneration):
    """The stock model, pruned."""

    def added_features(self, length: int) -> list[Tensor]:
        found = self._get_deepstack_input_embeds(length)
        return [] if found is None else [found[f"deepstack_input_embeds_{at}"] for at in range(len(found))]

    def clear_added_features(self, length: int) -> None:
        self._clear_deepstack_input_embeds(length)
