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

SIDE = 24  # of the table of position codes, which is stretched over each picture


def load_processor(folder: Path) -> Qwen3VLProcessor:
    """The run's processor; its tokeniser is trained when it first starts."""
    files = qwen.train_tokenizer(folder)
    tokenizer = Qwen2Tokenizer(
        vocab=files["vocab.json"],
        merges=files["merges.txt"],
        unk_token=qwen.PAD,
        eos_token=qwen.OVER,
        pad_token=qwen.PAD,
        additional_special_tokens=[qwen.TURN, qwen.OVER, qwen.START, qwen.END, qwen.IMAGE, qwen.VIDEO],
        model_max_length=4096,
    )
    half = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    return Qwen3VLProcessor(
        Qwen2VLImageProcessorFast(patch_size=16, **half),
        tokenizer,
        Qwen3VLVideoProcessor(**half),
        chat_template=qwen.CHAT_TEMPLATE,
    )


def build(processor: Qwen3VLProcessor) -> Qwen3VLForConditionalGeneration:
    """The untrained model."""
    id_of = processor.tokenizer.convert_tokens_to_ids
    config = Qwen3VLConfig(
        text_config={
            "vocab_size": len(processor.tokenizer),
            "hidden_size": 192,
            "intermediate_size": 480,
            "num_hidden_layers": 12,
            "num_attention_heads": 6,
            "num_key_value_heads": 2,
            "head_dim": 32,
            "max_position_embeddings": 4096,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1000.0, "mrope_section": [6, 5, 5]},
            "bos_token_id": id_of(qwen.PAD),
            "eos_token_id": id_of(qwen.OVER),
            "pad_token_id": id_of(qwen.PAD),
        },
        vision_config={
            "depth": 6,
            "hidden_size": 128,
            "intermediate_size": 512,
            "num_heads": 4,
            "out_hidden_size": 192,
            "num_position_embeddings": SIDE**2,
            "deepstack_visual_indexes": [1, 2, 4],
        },
        image_token_id=id_of(qwen.IMAGE),
        video_token_id=id_of(qwen.VIDEO),
        vision_start_token_id=id_of(qwen.START),
        vision_end_token_id=id_of(qwen.END),
    )
    model = Qwen3VLForConditionalGeneration(config)
    model.generation_config.eos_token_id = id_of(qwen.OVER)
    model.generation_config.pad_token_id = id_of(qwen.PAD)
    positions = model.model.visual.pos_embed.weight
    # Left random, position codes hardly come to tell the tower where in the picture a patch lies.
    positions.data.copy_(training.sine_positions((SIDE, SIDE), positions.shape[1]))
    return model


class Qwen3Student(qwen.QwenStudent):
    """The features are the decoder's visual embeddings and, beside them, DeepStack's."""

    visual_width = 4 * 192

    def __init__(self, processor: Qwen3VLProcessor) -> None:
        super().__init__(build(processor), processor, apply_rotary_pos_emb_vision)

    def features(self, output: Any) -> Tensor:
        return torch.cat([output.pooler_output, *output.deepstack_features], dim=-1)

    def show(self, shown: Tensor, before: int, length: int) -> tuple[Tensor, dict[str, Any]]:
        visual, *deepstack = shown.chunk(4, dim=-1)
        at = torch.arange(length, device=shown.device)
        mask = ((at >= before) & (at < before + shown.shape[1])).expand(len(shown), -1)
        return visual, {"visual_pos_masks": mask, "deepstack_visual_embeds": [x.flatten(0, 1) for x in deepstack]}


def main() -> None:
    """Train and export."""
    options = training.options(__doc__)
    torch.manual_seed(0)
    training.Run(Qwen3Student(load_processor(Path(options.work))), options).train()


if __name__ == "__main__":
    main()
