"""The backbone of Gemma 3."""

from dataclasses import replace
from functools import partial
from typing import Any

from torch import nn
from transformers import Gemma3ForConditionalGeneration, SiglipVisionModel
from transformers.models.gemma3.modeling_gemma3 import Gemma3TextModel

from current_vlm.placeholders import TiledBackbone, mean_of_blocks
from strategy import LayerSpec, register_backbone
from strategy.backbone import EncoderSpec


def siglip_spec(tower: nn.Module, **more: Any) -> EncoderSpec | None:
    """Describe a SigLIP tower, which has no class token; return None for any other tower.

    Args:
        tower: The vision tower.
        more: Further fields of `EncoderSpec`.
    """
    if not isinstance(tower, SiglipVisionModel):
        return None
    layers, heads = tower.encoder.layers, tower.config.num_attention_heads
    return EncoderSpec(layers, "self_attn.q_proj", "self_attn.k_proj", heads, class_token=False, **more)


class Gemma3Backbone(TiledBackbone):
    """Gemma 3, whose visual tokens see each other both ways, and most of whose layers see a window."""

    name = "gemma3"
    models = (Gemma3ForConditionalGeneration,)
    decoders = (Gemma3TextModel,)
    entry_makes_masks = True

    def tile(self, config: Any) -> tuple[int, int]:
        return (int(config.mm_tokens_per_image**0.5),) * 2

    def encoder(self, model: Any) -> EncoderSpec | None:
        tower = model.model.vision_tower
        side = tower.config.image_size // tower.config.patch_size
        return siglip_spec(tower, merge=partial(mean_of_blocks, block=side // self.tile(model.config)[0]))

    def layer_spec(self, layer: nn.Module) -> LayerSpec:
        # There are norms behind attention and MLP, too.
        return replace(
            super().layer_spec(layer), norm="rms, weight + 1", post_attention_norm="pre_feedforward_layernorm"
        )


register_backbone(Gemma3Backbone())
