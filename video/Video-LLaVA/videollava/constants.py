"""The constants that Video-LLaVA's prompts and checkpoints are written with."""

from llava.constants import DEFAULT_IMAGE_TOKEN, IGNORE_INDEX, IMAGE_TOKEN_INDEX

DEFAULT_VIDEO_TOKEN = "<video>"
NUM_FRAMES = 8

__all__ = ["DEFAULT_IMAGE_TOKEN", "DEFAULT_VIDEO_TOKEN", "IGNORE_INDEX", "IMAGE_TOKEN_INDEX", "NUM_FRAMES"]
