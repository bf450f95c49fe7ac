"""Video-LLaVA on stock transformers, under the module names that callers of Video-LLaVA use."""

from videollava import backbone as _backbone  # noqa: F401  importing it registers the adapter
from videollava.model import VideoLlavaForCausalLM

__all__ = ["VideoLlavaForCausalLM"]
