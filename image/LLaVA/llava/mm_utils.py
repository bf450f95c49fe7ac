"""Pictures and prompts made ready for the model."""

from collections.abc import Sequence
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import CLIPImageProcessor, PreTrainedTokenizerBase

from llava.constants import DEFAULT_IMAGE_TOKEN, IMAGE_TOKEN_INDEX


def expand2square(image: Image.Image, background: tuple[int, int, int]) -> Image.Image:
    """Centre the picture on a square of its longer side."""
    side = max(image.size)
    square = Image.new(image.mode, (side, side), background)
    square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
    return square


def process_images(images: list[Image.Image], image_processor: CLIPImageProcessor, model_cfg: Any) -> Tensor:
    """Turn pictures into one tensor [count, 3, side, side].

    With `image_aspect_ratio` "pad" in `model_cfg`, each picture is first centred on a square in the
    processor's mean colour; else the processor alone scales and crops.
    """
    pictures = [image.convert("RGB") for image in images]
    if getattr(model_cfg, "image_aspect_ratio", None) == "pad":
        red, green, blue = (int(255 * mean) for mean in image_processor.image_mean)
        pictures = [expand2square(picture, (red, green, blue)) for picture in pictures]
    return image_processor.preprocess(pictures, return_tensors="pt")["pixel_values"]


def tokenizer_image_token(
    prompt: str,
    tokenizer: PreTrainedTokenizerBase,
    image_token_index: int = IMAGE_TOKEN_INDEX,
    return_tensors: str | None = None,
) -> list[int] | Tensor:
    """Tokenise a prompt, each `<image>` in it becoming `image_token_index`.

    Returns a list, or a LongTensor [length] with return_tensors="pt".
    """
    if return_tensors not in (None, "pt"):
        raise ValueError(f"return_tensors={return_tensors!r}: allowed are None and 'pt'")
    ids: list[int] = []
    for number, chunk in enumerate(prompt.split(DEFAULT_IMAGE_TOKEN)):
        piece = tokenizer(chunk).input_ids
        starts = bool(piece) and piece[0] == tokenizer.bos_token_id
        # The tokeniser opens every chunk as if it were a text of its own; one opening is enough.
        ids += piece if number == 0 else [image_token_index, *piece[starts:]]
    return ids if return_tensors is None else torch.tensor(ids, dtype=torch.long)


def get_model_name_from_path(model_path: str) -> str:
    """The model's name in a folder or hub id; a `checkpoint-N` folder also names its parent."""
    parts = model_path.strip("/").split("/")
    return "_".join(parts[-2:]) if parts[-1].startswith("checkpoint-") else parts[-1]


def pad_left(prompts: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Lay prompts [length] side by side, filled up with 0 on the left.

    Returns token ids [B, S] and a mask [B, S], False where they were filled up.
    """
    ids = pad_sequence([prompt.flip(0) for prompt in prompts], batch_first=True).flip(1)
    lengths = torch.tensor([len(prompt) for prompt in prompts])
    return ids, torch.arange(ids.shape[1]).flip(0) < lengths[:, None]
