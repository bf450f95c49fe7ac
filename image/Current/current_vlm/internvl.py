"""The backbone of InternVL3 and 3.5 in the format of transformers."""

from functools import partial
from typing import Any

from transformers import InternVLForConditionalGeneration, InternVLVisionModel

from current_vlm.placeholders import TiledBackbone, mean_of_blocks
from strategy import register_backbone
from strategy.backbone import EncoderSpec


class InternVLBackbone(TiledBackbone):
    """InternVL, whose call does not tell how the tiles of a picture lie beside each other."""

    name = "internvl"
    models = (InternVLForConditionalGeneration,)
    decoders = ()

    def tile(self, config: Any) -> tuple[int, int]:
        vision, ratio = config.vision_config, config.downsample_ratio
        height, width = (
            int(size // patch * ratio) for size, patch in zip(vision.image_size, vision.patch_size, strict=True)
        )
        return height, width

    def encoder(self, model: Any) -> EncoderSpec | None:
        tower, block = model.model.vision_tower, round(1 / model.config.downsample_ratio)
        if not isinstance(tower, InternVLVisionModel):
            return None
        return EncoderSpec(
            tower.encoder.layer,
            query="attention.q_norm",  # does nothing where there is no norm
            key="attention.k_norm",
            heads=tower.config.num_attention_heads,
            merge=partial(mean_of_blocks, block=block),
        )


register_backbone(InternVLBackbone())
