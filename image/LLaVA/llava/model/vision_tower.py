"""The CLIP tower whose patch features become visual tokens."""

from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import CLIPImageProcessor, CLIPVisionModel


class CLIPVisionTower(nn.Module):
    """A frozen CLIP vision model, read at one of its hidden layers.

    folder: with a CLIP vision model and its image processor. select_layer: index into the hidden states,
    as in `mm_vision_select_layer`. keep_class: whether the class token stays in front of the patches.
    """

    def __init__(self, folder: Path, select_layer: int, keep_class: bool, dtype: torch.dtype) -> None:
        super().__init__()
        self.image_processor = CLIPImageProcessor.from_pretrained(folder)
        self.vision_tower = CLIPVisionModel.from_pretrained(folder, torch_dtype=dtype)
        self.select_layer, self.keep_class = select_layer, keep_class
        self.requires_grad_(False)

    @property
    def grid(self) -> tuple[int, int, int]:
        """Frames, rows and columns of one picture's patches."""
        side = self.vision_tower.config.image_size // self.vision_tower.config.patch_size
        return 1, side, side

    @property
    def hidden_size(self) -> int:
        """Width of the features."""
        return int(self.vision_tower.config.hidden_size)

    def forward(self, images: Tensor) -> Tensor:
        """Features [count, N, width] of pictures [count, 3, side, side]."""
        images = images.to(self.vision_tower.device, self.vision_tower.dtype)
        features = self.vision_tower(images, output_hidden_states=True).hidden_states[self.select_layer]
        return features if self.keep_class else features[:, 1:]
