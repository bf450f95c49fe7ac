"""LLaVA-1.5 on stock transformers, under the module names that callers of LLaVA use."""

from llava import backbone as _backbone  # noqa: F401  importing it registers the adapter
from llava.model import LlavaLlamaForCausalLM

__all__ = ["LlavaLlamaForCausalLM"]
