"""The backbones of the LLaVA models in the format of transformers."""

from typing import Any

from transformers import LlavaForConditionalGeneration

from current_vlm.placeholders import TiledBackbone
from strategy import register_backbone


class LlavaHFBackbone(TiledBackbone):
    """LLaVA-1.5, whose pictures are one square each."""

    name = "llava_hf"
    models = (LlavaForConditionalGeneration,)
    decoders = ()
    own_size = False

    def tile(self, config: Any) -> tuple[int, int]:
        return (vision_side(config),) * 2


def vision_side(config: Any) -> int:
    """Return how many visual tokens stand along a side of what the vision tower sees."""
    return int(config.vision_config.image_size // config.vision_config.patch_size)


register_backbone(LlavaHFBackbone())
