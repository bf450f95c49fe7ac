"""The backbone of InternVL3 and 3.5 in the format of transformers."""

from typing import Any

from transformers import InternVLForConditionalGeneration

from current_vlm.placeholders import TiledBackbone
from strategy import register_backbone


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


register_backbone(InternVLBackbone())
