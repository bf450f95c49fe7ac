"""Video-LLaVA on the stock Llama of transformers: features of a video's frames become embeddings of the prompt."""

from collections.abc import Sequence

from torch import Tensor

from llava.model.llava_llama import LlavaConfig, LlavaLlamaForCausalLM, LlavaLlamaModel
from llava.model.prompts import Visual
from videollava.model.tower import FrameTower

KINDS = ("image", "video")


class VideoLlavaModel(LlavaLlamaModel):
    """The decoder with its projector and the towers whose weights are in the checkpoint.

    Args:
        config: The configuration; its `towers` holds the configurations of these towers, by kind.
    """

    def __init__(self, config: LlavaConfig) -> None:
        super().__init__(config)
        for kind in KINDS:
            inside = config.towers.get(kind)
            tower = FrameTower(kind, inside, config.mm_vision_select_layer) if inside else None
            setattr(self, f"{kind}_tower", tower)


class VideoLlavaForCausalLM(LlavaLlamaForCausalLM):
    """Video-LLaVA for inference.

    Each frame of a video, and each picture, replaces one `IMAGE_TOKEN_INDEX` entry of `input_ids`. The argument
    `images` is a list of videos [3, T, side, side] and pictures [3, side, side], in the order of the prompts.
    """

    def __init__(self, config: LlavaConfig) -> None:
        super(LlavaLlamaForCausalLM, self).__init__(config)
        self.model = VideoLlavaModel(config)
        self.post_init()

    def encode(self, images: Tensor | Sequence[Tensor]) -> list[Visual]:
        visuals = []
        for pixels in images:
            if pixels.dim() not in (3, 4) or pixels.shape[0] != 3:
                raise ValueError(
                    f"a visual of shape {tuple(pixels.shape)}: want a video [3, T, H, W] or a picture [3, H, W]"
                )
            tower = self.model.image_tower if pixels.dim() == 3 else self.model.video_tower
            frames = pixels[None] if pixels.dim() == 3 else pixels.transpose(0, 1)
            tokens = self.project(tower(frames))
            if pixels.dim() == 3:
                visuals.append(Visual([tokens[0, 1:]], (1, tower.side, tower.side)))
            else:
                visuals.append(Visual(list(tokens), (len(tokens), tower.side, tower.side), lead=1))
        return visuals
