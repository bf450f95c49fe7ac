"""The shared engine checks on Qwen2-VL's decoder."""

from engine_checks import *  # noqa: F403
