"""The backbone of PaliGemma."""

from dataclasses import replace
from typing import Any

from torch import nn
from transformers import Gemma2Model, GemmaModel, PaliGemmaForConditionalGeneration

from current_vlm.gemma3 import siglip_spec
from current_vlm.llava import vision_side
from current_vlm.placeholders import TiledBackbone
from strategy import LayerSpec, register_backbone
from strategy.backbone import EncoderSpec


class PaliGemmaBackbone(TiledBackbone):
    """PaliGemma 1 and 2, whose prompts see themselves both ways; in 2, every other layer sees a window."""

    name = "paligemma"
    models = (PaliGemmaForConditionalGeneration,)
    decoders = (GemmaModel, Gemma2Model)
    entry_makes_masks = True

    def tile(self, config: Any) -> tuple[int, int]:
        return (vision_side(config),) * 2

    def encoder(self, model: Any) -> EncoderSpec | None:
        return siglip_spec(model.model.vision_tower)

    def layer_spec(self, layer: nn.Module) -> LayerSpec:
        spec: LayerSpec = replace(super().layer_spec(layer), norm="rms, weight + 1")
        if hasattr(layer, "pre_feedforward_layernorm"):
            # There are norms behind attention and MLP, too.
            spec = replace(spec, post_attention_norm="pre_feedforward_layernorm")
        if getattr(layer.self_attn, "attn_logit_softcapping", None) is not None:
            spec = replace(spec, attention="soft-capped")
        return spec


register_backbone(PaliGemmaBackbone())
