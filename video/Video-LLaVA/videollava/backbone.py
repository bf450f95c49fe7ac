"""The backbone of Video-LLaVA."""

from torch import nn

from llava.backbone import LlamaBackbone
from strategy import register_backbone
from videollava.model.video_llava import VideoLlavaForCausalLM


class VideoLlavaBackbone(LlamaBackbone):
    """Video-LLaVA: eight frames of 16 x 16 patches, each with a class token."""

    name = "videollava"
    models = (VideoLlavaForCausalLM,)
    nominal_tokens = 2048
    video = True

    def vision(self, model: VideoLlavaForCausalLM) -> list[nn.Module]:
        parts = (model.model.image_tower, model.model.video_tower, model.model.mm_projector)
        return [part for part in parts if part is not None]


register_backbone(VideoLlavaBackbone())
