"""The backbone of Qwen3-VL on transformers 5.2."""

from qwen_vl_vtr.deepstack import DeepStackBackbone
from strategy import register_backbone


class Qwen3VLBackbone(DeepStackBackbone):
    """Qwen3-VL, whose tower asks the host for sizes in methods of its own."""

    size_methods = ("rot_pos_emb", "fast_pos_embed_interpolate")


register_backbone(Qwen3VLBackbone())
