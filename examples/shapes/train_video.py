"""Train `shapes-video` from scratch and write it in the original Video-LLaVA format."""

from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import CLIPVisionConfig, LlamaTokenizer

import clips
import train_llava
import training
import world

# Heads are 64 wide, as in every CLIP: that is how a loader knows how many there are.
TOWER = CLIPVisionConfig(
    hidden_size=128, intermediate_size=192, num_hidden_layers=4, num_attention_heads=2, image_size=224, patch_size=14
)

LATE = 5  # frames after which every object was long enough there to be seen moving
TEMPLATE = "llava_v1"  # that of the published Video-LLaVA
HEADING_WEIGHT = 3.0  # as much again as the dense losses are weighed with


def asked() -> Iterator[world.Question]:
    """Questions enough to meet every word."""
    for seed in range(20):
        drawn = clips.sample_clips(64, world.FIRST_TRAINING_SEED + seed)
        for index in range(64):
            yield from clips.questions(drawn, index)


class VideoStudent(train_llava.LlavaStudent):
    """Eight frames through one CLIP tower, class tokens and all; the picture tower is its twin.

    Which way things move was not learned from answers alone in hundreds of steps. So a further head,
    thrown away like the dense ones, asks for it after the decoder's third layer, at the tokens of late
    frames that show an object.
    """

    sizes = ((clips.SIDE, clips.SIDE),)
    visual_width = TOWER.hidden_size
    frames = clips.FRAMES
    template = TEMPLATE
    tower_config = TOWER
    decoder_config = train_llava.DECODER | {
        "hidden_size": 128,
        "intermediate_size": 160,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "max_position_embeddings": 4096,
    }

    def __init__(self, tokenizer: LlamaTokenizer) -> None:
        super().__init__(tokenizer)
        self.heading = nn.Linear(self.decoder.config.hidden_size, len(clips.DIRECTIONS) + 1)
        self.listen_to(self.decoder.model.layers[2])

    def lesson(self, count: int, seed: int, device: torch.device) -> training.Lesson:
        drawn, grid = clips.sample_clips(count, seed), self.grid(self.sizes[0])
        heading = drawn.heading.repeat_interleave(drawn.frames, dim=0)
        labels = {
            # Each frame begins with a class token, which shows no place of the picture.
            name: F.pad(values, (1, 0), value=training.IGNORED).view(count, -1)
            for name, values in world.patch_labels(drawn.scenes, grid, heading=heading).items()
        }
        self.headings = labels["heading"].to(device)
        questions = [list(clips.questions(drawn, index)) for index in range(count)]
        return training.Lesson(drawn.render(seed, device), labels, grid, questions)

    def encode(self, pictures: Tensor) -> Tensor:
        pixels = ((pictures - self.image_mean) / self.image_std).flatten(0, 1)
        features = self.tower(pixels, output_hidden_states=True).hidden_states[-1]
        return features.unflatten(0, (len(pictures), -1)).flatten(1, 2)

    def answer(self, features: Tensor, grid: tuple[int, int], kept: Tensor, text: training.Packed) -> Tensor:
        logits = super().answer(features, grid, kept, text)
        if self.training:
            visual = self.heard[:, len(self.before) : len(self.before) + kept.shape[1]]
            heading = self.headings.gather(1, kept)
            late = (heading > 0) & (kept >= LATE * (1 + grid[0] * grid[1]))
            self.further_loss = HEADING_WEIGHT * F.cross_entropy(self.heading(visual[late]).float(), heading[late])
        return logits

    def export_towers(self, folder: Path) -> dict[str, str]:
        return {"mm_image_tower": "image_tower", "mm_video_tower": "video_tower"}

    def inside_towers(self) -> dict[str, Tensor]:
        weights = self.tower.vision_model.state_dict()
        return {
            f"model.{kind}_tower.{kind}_tower.{name}": tensor
            for kind in ("image", "video")
            for name, tensor in weights.items()
        }


def main() -> None:
    """Train and export."""
    options = training.options(__doc__, batch=32, answer_steps=2513)
    torch.manual_seed(0)
    tokenizer = train_llava.load_tokenizer(Path(options.work), asked, TEMPLATE)
    training.Run(VideoStudent(tokenizer), options).train()


if __name__ == "__main__":
    main()
