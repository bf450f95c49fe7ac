"""Preparation of videos, pictures and prompts for the model."""

import math
from pathlib import Path

import av
import decord
import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F
from torchvision.transforms.functional import center_crop, normalize, to_tensor

from llava.mm_utils import get_model_name_from_path, tokenizer_image_token
from strategy.evaluation.pictures import to_rgb
from strategy.evaluation.special_tokens import as_text
from videollava.constants import DEFAULT_IMAGE_TOKEN, DEFAULT_VIDEO_TOKEN, NUM_FRAMES

# CLIP's normalisation, by colour.
MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)

__all__ = [
    "get_model_name_from_path",
    "load_video",
    "prepare_image",
    "prepare_prompt",
    "prepare_video",
    "tokenizer_image_token",
]


def load_video(path: str | Path, frames: int = NUM_FRAMES) -> Tensor:
    """Decode frames that are evenly spaced over a video, the first and the last among them.

    Args:
        path: The file.
        frames: How many frames.

    Returns:
        [frames, 3, H, W] uint8.

    Raises:
        ValueError: The file, which the message names, cannot be opened or decoded.
    """
    try:
        return torch.from_numpy(_decoded(str(path), frames)).permute(0, 3, 1, 2)
    except (decord.DECORDError, av.FFmpegError, RuntimeError, ValueError, OSError, IndexError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ValueError(f"{path}: cannot be decoded ({reason})") from error


def _decoded(path: str, frames: int) -> np.ndarray:
    """Return frames [frames, H, W, 3] uint8 of a video."""
    try:
        reader = decord.VideoReader(path, num_threads=1)
        return reader.get_batch(_evenly(len(reader), frames)).asnumpy()
    except decord.DECORDError:  # such as an animated GIF, whose length the file does not hold
        with av.open(path) as video:
            every = [frame.to_ndarray(format="rgb24") for frame in video.decode(video=0)]
        return np.stack([every[number] for number in _evenly(len(every), frames)])


def _evenly(count: int, wanted: int) -> np.ndarray:
    """Return the numbers of `wanted` frames that are evenly spaced over `count`; raise ValueError if there are none."""
    if not count:
        raise ValueError("it has no frames")
    return np.linspace(0, count - 1, wanted, dtype=int)


def prepare_video(frames: Tensor, side: int = 224) -> Tensor:
    """Turn frames [T, 3, H, W] uint8 into the input of the video tower, [3, T, side, side] float32.

    The frames are scaled to the unit range, normalised as for CLIP, resized so that the short side is `side`, and
    cropped to the centre.
    """
    pixels = normalize(frames.float() / 255, MEAN, STD)
    return center_crop(_resize(pixels, side, "bilinear"), [side, side]).transpose(0, 1)


def prepare_image(image: Image.Image, side: int = 224) -> Tensor:
    """Turn a picture into the input of the image tower, [3, side, side] float32."""
    pixels = _resize(to_tensor(to_rgb(image))[None], side, "bicubic")
    return normalize(center_crop(pixels, [side, side]), MEAN, STD)[0]


def _resize(pixels: Tensor, side: int, mode: str) -> Tensor:
    """Resize pictures [T, 3, H, W] so that the shorter side is `side`."""
    height, width = pixels.shape[-2:]
    short = min(height, width)
    size = math.floor(height / short * side), math.floor(width / short * side)
    return F.interpolate(pixels, size=size, mode=mode, align_corners=False)


def prepare_prompt(question: str) -> str:
    """Return a question with a picture token for each frame.

    They replace a `<video>` in the question. Without one, or with several, they come first; what else the question has
    of such marks stays text.
    """
    frames, question = DEFAULT_IMAGE_TOKEN * NUM_FRAMES, as_text(question, [DEFAULT_IMAGE_TOKEN])
    if question.count(DEFAULT_VIDEO_TOKEN) == 1:
        return question.replace(DEFAULT_VIDEO_TOKEN, frames)
    return f"{frames}\n{as_text(question, [DEFAULT_VIDEO_TOKEN])}"
