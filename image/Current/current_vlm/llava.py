"""The backbones of the LLaVA models in the format of transformers."""

import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from transformers import (
    CLIPVisionModel,
    LlavaForConditionalGeneration,
    LlavaNextForConditionalGeneration,
    LlavaOnevisionForConditionalGeneration,
)
from transformers.models.clip.modeling_clip import CLIPEncoder
from transformers.models.llava_next.modeling_llava_next import get_anyres_image_grid_shape, unpad_image

from current_vlm.placeholders import Picture, PlaceholderBackbone, TiledBackbone, tiles
from strategy import Span, register_backbone
from strategy.backbone import EncoderSpec


class LlavaHFBackbone(TiledBackbone):
    """LLaVA-1.5, whose pictures are one square each."""

    name = "llava_hf"
    models = (LlavaForConditionalGeneration,)
    decoders = ()
    own_size = False

    def tile(self, config: Any) -> tuple[int, int]:
        return (vision_side(config),) * 2

    def encoder(self, model: Any) -> EncoderSpec | None:
        tower = model.model.vision_tower
        if not isinstance(tower, CLIPVisionModel):  # only CLIP's is known to have a class token
            return None
        layers = next(each for each in tower.modules() if isinstance(each, CLIPEncoder)).layers
        heads = tower.config.num_attention_heads
        return EncoderSpec(layers, query="self_attn.q_proj", key="self_attn.k_proj", heads=heads)


class LlavaNextBackbone(PlaceholderBackbone):
    """LLaVA-NeXT: the whole picture in small, then in rows of tiles, each row with a new line behind it."""

    name = "llava_next"
    models = (LlavaNextForConditionalGeneration,)
    decoders = ()

    def pictures(self, model: Any, kwargs: Mapping[str, Any]) -> dict[int, Iterable[Picture]]:
        sizes = kwargs.get("image_sizes")
        if sizes is None:
            return {}
        return {model.config.image_token_id: [self.picture(model.config, size) for size in sizes.tolist()]}

    def picture(self, config: Any, size: list[int]) -> Picture:
        """Return the spans of a picture of so many rows and columns of pixels."""
        side = vision_side(config)
        rows, columns = get_anyres_image_grid_shape(size, config.image_grid_pinpoints, config.vision_config.image_size)
        # The shape is the library's own, rounding and all; no memory is allocated for it.
        padded = torch.empty(1, rows * side, columns * side, device="meta")
        height, width = self.grid(config, *unpad_image(padded, size).shape[1:])
        spans = [Span(0, (1, side, side)), Span(side * side, (1, height, width), row_tail=1)]
        # Of a picture that is much longer than wide, nothing may be left but the small one.
        return Picture(spans if height and width else spans[:1], side * side + height * (width + 1))

    def grid(self, config: Any, height: int, width: int) -> tuple[int, int]:
        """Return rows and columns of a picture whose tiles have so many."""
        return height, width


class LlavaOnevisionBackbone(LlavaNextBackbone):
    """LLaVA-OneVision: the same, shrunk to a number of tiles; several pictures of a prompt and videos are small."""

    name = "llava_onevision"
    models = (LlavaOnevisionForConditionalGeneration,)

    def pictures(self, model: Any, kwargs: Mapping[str, Any]) -> dict[int, Iterable[Picture]]:
        config, side = model.config, vision_side(model.config)
        found = super().pictures(model, kwargs)
        if found and (counts := kwargs.get("batch_num_images")) is not None:
            alone = [count == 1 for count in counts.tolist() for _ in range(count)]
            small = tiles(1, side, side)._replace(size=side * side + 1)  # a new line follows
            found = {
                token: [own if single else small for own, single in zip(given, alone, strict=True)]
                for token, given in found.items()
            }
        if (videos := kwargs.get("pixel_values_videos")) is not None:
            frames, half = videos.shape[1], math.ceil(side / 2)
            video = Picture([Span(0, (frames, half, half))], frames * half * half + 1)
            found[config.video_token_id] = [video] * len(videos)
        return found

    def grid(self, config: Any, height: int, width: int) -> tuple[int, int]:
        most = int(config.vision_aspect_ratio.removeprefix("anyres_max_"))
        ratio = math.sqrt(height * width / (most * vision_side(config) ** 2))
        return (int(height // ratio), int(width // ratio)) if ratio > 1.1 else (height, width)


def vision_side(config: Any) -> int:
    """Return how many visual tokens stand along a side of what the vision tower sees."""
    return int(config.vision_config.image_size // config.vision_config.patch_size)


for _backbone in (LlavaHFBackbone(), LlavaNextBackbone(), LlavaOnevisionBackbone()):
    register_backbone(_backbone)
