"""Train `shapes-qwen3_5` from scratch and write it in the format of stock transformers."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import (
    Qwen2VLImageProcessor,
    Qwen3_5Config,
    Qwen3_5ForConditionalGeneration,
    Qwen3_5Tokenizer,
    Qwen3VLProcessor,
    Qwen3VLVideoProcessor,
)
from transformers.models.qwen3_5.modeling_qwen3_5 import apply_rotary_pos_emb_vision

import qwen_student as qwen
import training

# As in the published models three linear layers precede each one of attention, half of whose channels rotate.
DECODER = {
    "num_hidden_layers": 16,
    "head_dim": 32,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 32,
    "linear_value_head_dim": 32,
    "full_attention_interval": 4,
    "rope_parameters": {
        "rope_type": "default",
        "rope_theta": 1000.0,
        "mrope_section": [2, 3, 3],
        "mrope_interleaved": True,
        "partial_rotary_factor": 0.5,
    },
}


def load_processor(folder: Path) -> Qwen3VLProcessor:
    """The run's processor; its tokeniser is trained when it first starts."""
    files = qwen.train_tokenizer(folder)
    tokenizer = Qwen3_5Tokenizer(vocab=files["vocab.json"], merges=files["merges.txt"], **qwen.TOKENIZER)
    return qwen.coded_processor(Qwen3VLProcessor, Qwen2VLImageProcessor, tokenizer, Qwen3VLVideoProcessor)


class Qwen35Student(qwen.QwenStudent):
    """The features are the decoder's visual embeddings.

    A mask cannot keep questions apart in the state of a linear layer, so each question is a sequence of its own.
    """

    visual_width = qwen.DECODER["hidden_size"]

    def __init__(self, processor: Qwen3VLProcessor) -> None:
        model = qwen.build(
            Qwen3_5ForConditionalGeneration, Qwen3_5Config, processor.tokenizer, DECODER, qwen.CODED_TOWER
        )
        qwen.set_position_codes(model.model.visual)
        super().__init__(model, processor, apply_rotary_pos_emb_vision)

    def features(self, output: Any) -> Tensor:
        return output.pooler_output

    def mask(self, text: training.Packed, before: int) -> None:
        return None  # what pads a question lies behind it

    def answer(self, features: Tensor, grid: tuple[int, int], kept: Tensor, text: training.Packed) -> Tensor:
        questions, longest = (int(x.max()) + 1 for x in (text.block, text.position))
        shown = torch.arange(len(features), device=kept.device).repeat_interleave(questions)
        row = torch.arange(0, len(shown), questions, device=kept.device)[:, None] + text.block.clamp(min=0)
        real = text.block >= 0
        ids = text.ids.new_zeros(len(shown), longest)
        ids[row[real], text.position[real]] = text.ids[real]
        position = torch.arange(longest, device=kept.device).expand(len(shown), -1)
        alone = training.Packed(ids, position, block=torch.zeros_like(ids), target=torch.zeros_like(ids))
        return super().answer(features[shown], grid, kept[shown], alone)[row, text.position]


def main() -> None:
    """Train and export."""
    options = training.options(__doc__, answer_steps=2400, questions=8)
    torch.manual_seed(0)
    training.Run(Qwen35Student(load_processor(Path(options.work))), options).train()


if __name__ == "__main__":
    main()
