"""Preparation of pictures and prompts for the model."""

from collections.abc import Sequence
from typing import Any, Literal, overload

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import CLIPImageProcessor, PreTrainedTokenizerBase
from transformers.image_utils import ChannelDimension

from llava.constants import DEFAULT_IMAGE_TOKEN, IMAGE_TOKEN_INDEX
from llava.pixels import can_wait, fits, pixel_values
from strategy.evaluation.pictures import to_rgb
from strategy.evaluation.special_tokens import as_text
from strategy.kernels.transfers import pinned


def expand2square(image: Image.Image, background: tuple[int, int, int]) -> Image.Image:
    """Centre a picture on a square as large as its longer side."""
    side = max(image.size)
    square = Image.new(image.mode, (side, side), background)
    square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
    return square


def process_images(images: list[Image.Image], image_processor: CLIPImageProcessor, model_cfg: Any) -> Tensor:
    """Turn pictures into one tensor [count, 3, side, side].

    Args:
        images: The pictures.
        image_processor: Scales, crops and normalises them.
        model_cfg: The model's configuration. If its `image_aspect_ratio` is "pad", each picture is first centred on a
            square in the processor's mean colour.
    """
    return _pixel_values(_padded(images, image_processor, model_cfg), image_processor)


def prepare_pictures(
    images: Sequence[Image.Image], image_processor: CLIPImageProcessor, model_cfg: Any, device: torch.device
) -> list[Tensor]:
    """Turn pictures into what `generate` takes, and leave what a GPU computes faster to it.

    Args:
        images: The pictures.
        image_processor: As for `process_images`.
        model_cfg: As for `process_images`.
        device: That of the model.

    Returns:
        For each picture bytes [side, side, 3] uint8, of which the model makes the pixel values that `process_images`
        computes, or these [3, side, side].
    """
    on_gpu = device.type == "cuda" and fits(image_processor)
    return [
        pinned(
            torch.from_numpy(np.array(picture))
            if on_gpu and can_wait(picture, image_processor)
            else _pixel_values([picture], image_processor)[0]
        )
        for picture in _padded(images, image_processor, model_cfg)
    ]


def _padded(images: Sequence[Image.Image], processor: CLIPImageProcessor, model_cfg: Any) -> list[Image.Image]:
    pictures = [to_rgb(image) for image in images]
    if getattr(model_cfg, "image_aspect_ratio", None) == "pad":
        red, green, blue = (int(255 * mean) for mean in processor.image_mean)
        pictures = [expand2square(picture, (red, green, blue)) for picture in pictures]
    return pictures


def _pixel_values(pictures: list[Image.Image], processor: CLIPImageProcessor) -> Tensor:
    if fits(processor) and pictures:
        return pixel_values(pictures, processor)
    # Otherwise the processor takes the rows of a picture that is 1 or 3 pixels high for its colours.
    values: Tensor = processor.preprocess(pictures, return_tensors="pt", input_data_format=ChannelDimension.LAST)[
        "pixel_values"
    ]
    return values


def place_pictures(text: str, pictures: int) -> str:
    """Return a question's text with an `<image>` for each picture.

    Where the text has as many as there are pictures, these stand for the pictures. Otherwise the pictures come first,
    and what the text has stays text; without pictures it is left out.
    """
    while not pictures and DEFAULT_IMAGE_TOKEN in text:
        text = text.replace(DEFAULT_IMAGE_TOKEN, "")  # what is left may spell it again
    if text.count(DEFAULT_IMAGE_TOKEN) == pictures:
        return text
    return " ".join([DEFAULT_IMAGE_TOKEN] * pictures) + "\n" + as_text(text, [DEFAULT_IMAGE_TOKEN])


@overload
def tokenizer_image_token(
    prompt: str, tokenizer: PreTrainedTokenizerBase, image_token_index: int = ..., return_tensors: None = ...
) -> list[int]: ...
@overload
def tokenizer_image_token(
    prompt: str, tokenizer: PreTrainedTokenizerBase, image_token_index: int = ..., *, return_tensors: Literal["pt"]
) -> Tensor: ...
@overload
def tokenizer_image_token(
    prompt: str, tokenizer: PreTrainedTokenizerBase, image_token_index: int, return_tensors: Literal["pt"]
) -> Tensor: ...
def tokenizer_image_token(
    prompt: str,
    tokenizer: PreTrainedTokenizerBase,
    image_token_index: int = IMAGE_TOKEN_INDEX,
    return_tensors: str | None = None,
) -> list[int] | Tensor:
    """Tokenise a prompt, with `image_token_index` in place of each `<image>`.

    Returns:
        Token ids: a list, or with return_tensors="pt" a LongTensor [length].

    Raises:
        ValueError: `return_tensors` is neither None nor "pt".
    """
    if return_tensors not in (None, "pt"):
        raise ValueError(f"return_tensors={return_tensors!r}: allowed are None and 'pt'")
    ids: list[int] = []
    for number, chunk in enumerate(prompt.split(DEFAULT_IMAGE_TOKEN)):
        piece = tokenizer(chunk).input_ids
        starts = bool(piece) and piece[0] == tokenizer.bos_token_id
        # The tokeniser begins every chunk with the token that begins a text; only the first chunk keeps it.
        ids += piece if number == 0 else [image_token_index, *piece[starts:]]
    return ids if return_tensors is None else torch.tensor(ids, dtype=torch.long)


def get_model_name_from_path(model_path: str) -> str:
    """Return the model's name in a path or hub id; for a folder `checkpoint-N`, with the name of its parent."""
    parts = model_path.strip("/").split("/")
    return "_".join(parts[-2:]) if parts[-1].startswith("checkpoint-") else parts[-1]


def pad_left(prompts: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Stack prompts [length], padded with 0 on the left.

    Returns:
        Token ids [B, S], and a mask [B, S] that is False at padding.
    """
    ids = pad_sequence([prompt.flip(0) for prompt in prompts], batch_first=True).flip(1)
    lengths = torch.tensor([len(prompt) for prompt in prompts])
    return ids, torch.arange(ids.shape[1]).flip(0) < lengths[:, None]
