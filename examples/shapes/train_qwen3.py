"""Train `shapes-qwen3` from scratch and write it in the format of stock transformers."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import (
    Qwen2Tokenizer,
    Qwen2VLImageProcessorFast,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    Qwen3VLProcessor,
    Qwen3VLVideoProcessor,
)
from transformers.models.qwen3_vl.modeling_qwen3_vl import apply_rotary_pos_emb_vision

import qwen_student as qwen
import training

ROTARY = {
    "head_dim": 32,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1000.0, "mrope_section": [6, 5, 5]},
}
TOWER = qwen.CODED_TOWER | {"deepstack_visual_indexes": [1, 2, 4]}


def load_processor(folder: Path) -> Qwen3VLProcessor:
    """The run's processor; its tokeniser is trained when it first starts."""
    files = qwen.train_tokenizer(folder)
    tokenizer = Qwen2Tokenizer(vocab=files["vocab.json"], merges=files["merges.txt"], **qwen.TOKENIZER)
    return qwen.coded_processor(Qwen3VLProcessor, Qwen2VLImageProcessorFast, tokenizer, Qwen3VLVideoProcessor)


class Qwen3Student(qwen.QwenStudent):
    """The features are the decoder's visual embeddings and, beside them, DeepStack's."""

    visual_width = 4 * qwen.DECODER["hidden_size"]

    def __init__(self, processor: Qwen3VLProcessor) -> None:
        model = qwen.build(Qwen3VLForConditionalGeneration, Qwen3VLConfig, processor.tokenizer, ROTARY, TOWER)
        qwen.set_position_codes(model.model.visual)
        super().__init__(model, processor, apply_rotary_pos_emb_vision)

    def features(self, output: Any) -> Tensor:
        return torch.cat([output.pooler_output, *output.deepstack_features], dim=-1)

    def show(self, shown: Tensor, before: int, length: int) -> tuple[Tensor, dict[str, Any]]:
        visual, *deepstack = shown.chunk(4, dim=-1)
        at = torch.arange(length, device=shown.device)
        mask = ((at >= before) & (at < before + shown.shape[1])).expand(len(shown), -1)
        return visual, {"visual_pos_masks": mask, "deepstack_visual_embeds": [x.flatten(0, 1) for x in deepstack]}


def main() -> None:
    """Train and export."""
    options = training.options(__doc__, answer_steps=2465)
    torch.manual_seed(0)
    training.Run(Qwen3Student(load_processor(Path(options.work))), options).train()


if __name__ == "__main__":
    main()
