"""The engine where there is a GPU."""

from gpu_checks import *  # noqa: F403
