"""Prompt templates: those of LLaVA, of which Video-LLaVA's prompts take `llava_v1`."""

from llava.conversation import Conversation, conv_llava_v1, conv_templates, conv_vicuna_v1

default_conversation = conv_llava_v1

__all__ = ["Conversation", "conv_llava_v1", "conv_templates", "conv_vicuna_v1", "default_conversation"]
