"""Qwen2-VL on stock transformers, with visual token pruning."""

from qwen2_vl_vtr import backbone as _backbone  # noqa: F401  importing it registers the adapter
