"""The CLIP tower whose patch features become visual tokens."""

from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import CLIPImageProcessor, CLIPVisionModel


class CLIPVisionTower(nn.Module):
    """A frozen CLIP vision model, read at one of its hidden layers.

    folder: with a CLIP vision model and its image processor. select_layer: index into the hidden states,
    as in `mm_vision_select_layer`. Raises ValueError for a layer there is not.
    """

    def __init__(self, folder: Path, select_layer: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.image_processor = CLIPImageProcessor.from_pretrained(folder)
        self.vision_tower = CLIPVisionModel.from_pretrained(folder, torch_dtype=dtype)
        depth = self.vision_tower.config.num_hidden_layers
        if not -depth - 1 <= select_layer <= depth:
            raise ValueError(f"mm_vision_select_layer={select_layer}: the tower in {folder} has {depth} layers")
        self.select_layer = select_layer
        self.requires_grad_(False)

    @property
    def grid(self) -> tuple[int, int, int]:
        """Frames, rows and columns of one picture's patches."""
        side = self.vision_tower.config.image_size // self.vision_tower.config.patch_size
        return 1, side, side

    def forward(self, images: Tensor) -> Tensor:
        """Features [count, N, width] of the patches of pictures [count, 3, side, side]."""
        images = images.to(self.vision_tower.device, self.vision_tower.dtype)
        features = self.vision_tower(images, output_hidden_states=True).hidden_states[self.select_layer]
        return features[:, 1:]
