"""What strategies see of Qwen3-VL's vision tower."""

from qwen_checks import prompts  # noqa: F401
from qwen_encoder_checks import *  # noqa: F403
