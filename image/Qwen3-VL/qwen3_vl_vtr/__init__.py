"""Qwen3-VL on stock transformers, with visual token pruning."""

from qwen3_vl_vtr import backbone as _backbone  # noqa: F401  importing it registers the adapter
