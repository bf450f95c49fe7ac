"""The shared engine checks on Video-LLaVA's decoder, and the published run."""

from engine_checks import *  # noqa: F403
