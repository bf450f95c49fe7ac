"""Prompt templates: Video-LLaVA has Vicuna's, under another name."""

from llava.conversation import Conversation, conv_vicuna_v1
from llava.conversation import conv_templates as _llava_templates

default_conversation = conv_vicuna_v1
conv_templates = _llava_templates | {"llava_v1": conv_vicuna_v1}

__all__ = ["Conversation", "conv_templates", "default_conversation"]
