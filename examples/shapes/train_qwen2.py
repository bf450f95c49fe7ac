"""Train `shapes-qwen2` from scratch and write it in the format of stock transformers."""

from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import (
    Qwen2TokenizerFast,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    Qwen2VLImageProcessorFast,
    Qwen2VLProcessor,
    Qwen2VLVideoProcessor,
)
from transformers.models.qwen2_vl.modeling_qwen2_vl import apply_rotary_pos_emb_vision

import qwen_student as qwen
import training

# The slowest rates belong to the columns: at the usual base they could not tell one from the next.
ROTARY = {"rope_theta": 50.0, "rope_scaling": {"rope_type": "default", "mrope_section": [4, 6, 6]}}
TOWER = {"depth": 5, "embed_dim": 96, "hidden_size": qwen.DECODER["hidden_size"], "num_heads": 3, "mlp_ratio": 3}


def load_processor(folder: Path) -> Qwen2VLProcessor:
    """The run's processor; its tokeniser is trained when it first starts."""
    files = qwen.train_tokenizer(folder)
    tokenizer = Qwen2TokenizerFast(vocab_file=files["vocab.json"], merges_file=files["merges.txt"], **qwen.TOKENIZER)
    return Qwen2VLProcessor(
        Qwen2VLImageProcessorFast(), tokenizer, Qwen2VLVideoProcessor(), chat_template=qwen.CHAT_TEMPLATE
    )


class Qwen2Student(qwen.QwenStudent):
    """The features are the decoder's visual embeddings.

    This tower has no position codes: where a patch lies shows in the decoder's rotary positions alone, from
    which no answer was learned in hundreds of steps. So two further heads, thrown away like the dense ones,
    ask for each visual token's row and column after the third layer.
    """

    visual_width = qwen.DECODER["hidden_size"]

    def __init__(self, processor: Qwen2VLProcessor) -> None:
        model = qwen.build(Qwen2VLForConditionalGeneration, Qwen2VLConfig, processor.tokenizer, ROTARY, TOWER)
        super().__init__(model, processor, apply_rotary_pos_emb_vision)
        self.lines = nn.ModuleList(nn.Linear(self.visual_width, max(max(self.grids))) for _ in range(2))
        self.listen_to(self.model.model.language_model.layers[2])

    def examine(self, before: int, places: tuple[Tensor, ...]) -> None:
        visual = self.heard[:, before : before + places[0].shape[1]]
        self.further_loss = sum(
            F.cross_entropy(line(visual).float().flatten(0, 1), place.flatten())
            for line, place in zip(self.lines, places[1:], strict=True)
        )

    def features(self, output: Tensor) -> Tensor:
        return output


def main() -> None:
    """Train and export."""
    options = training.options(__doc__, answer_steps=2963)
    torch.manual_seed(0)
    training.Run(Qwen2Student(load_processor(Path(options.work))), options).train()


if __name__ == "__main__":
    main()
