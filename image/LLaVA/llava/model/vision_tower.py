"""The CLIP tower whose patch features become visual tokens."""

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate
from transformers import CLIPImageProcessor, CLIPVisionModel

from strategy.evaluation.downsampling import nearest_side


class CLIPVisionTower(nn.Module):
    """A frozen CLIP vision model with its image processor, whose features are those of a hidden layer.

    Args:
        vision_tower: The CLIP model.
        image_processor: Its image processor.
        select_layer: The index into the hidden states, as in `mm_vision_select_layer`.

    Raises:
        ValueError: The model has no such layer.
    """

    def __init__(self, vision_tower: CLIPVisionModel, image_processor: CLIPImageProcessor, select_layer: int) -> None:
        super().__init__()
        depth = vision_tower.config.num_hidden_layers
        if not -depth - 1 <= select_layer <= depth:
            raise ValueError(f"mm_vision_select_layer={select_layer}: the vision tower has {depth} layers")
        self.vision_tower, self.image_processor, self.select_layer = vision_tower, image_processor, select_layer
        self.requires_grad_(False)

    @property
    def grid(self) -> tuple[int, int, int]:
        """Return the grid (T, H, W) of one picture's patches."""
        side = self.vision_tower.config.image_size // self.vision_tower.config.patch_size
        return 1, side, side

    def downsample(self, tokens: int) -> None:
        """Take smaller pictures from now on, with about so many patches, as a control of pruning.

        The position codes are interpolated bicubically, as transformers does it for larger pictures.

        Raises:
            ValueError: The tower has fewer patches.
        """
        config, embeddings = self.vision_tower.config, self.vision_tower.vision_model.embeddings
        (_, full, _), side = self.grid, nearest_side(tokens)
        if side > full:
            raise ValueError(f"downsample={tokens}: the vision tower has {full**2} patches; want at most as many")
        codes = embeddings.position_embedding.weight.data
        patches = codes[1:].T.unflatten(1, (full, full))[None].float()
        smaller = interpolate(patches, (side, side), mode="bicubic", align_corners=False)[0].flatten(1).T
        codes = torch.cat([codes[:1], smaller.to(codes)])
        embeddings.position_embedding = nn.Embedding.from_pretrained(codes)
        embeddings.position_ids = torch.arange(len(codes), device=codes.device)[None]
        config.image_size = embeddings.image_size = pixels = side * config.patch_size
        self.image_processor.size = {"shortest_edge": pixels}
        self.image_processor.crop_size = {"height": pixels, "width": pixels}

    def forward(self, images: Tensor) -> Tensor:
        """Return the features [count, N, width] of the patches of pictures [count, 3, side, side]."""
        images = images.to(self.vision_tower.device, self.vision_tower.dtype)
        features = self.vision_tower(images, output_hidden_states=True).hidden_states[self.select_layer]
        return features[:, 1:]
