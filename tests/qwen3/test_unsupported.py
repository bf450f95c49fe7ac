"""What a pruned Qwen3-VL refuses, and what it leaves unpruned."""

from qwen_unsupported_checks import *  # noqa: F403
