"""The shared engine checks on Qwen3-VL's decoder."""

from engine_checks import *  # noqa: F403
