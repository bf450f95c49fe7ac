"""The model and its loader."""

from videollava.model.video_llava import VideoLlavaForCausalLM

__all__ = ["VideoLlavaForCausalLM"]
