"""Prompt templates: Video-LLaVA speaks Vicuna's, under a name of its own."""

from llava.conversation import Conversation, conv_vicuna_v1
from llava.conversation import conv_templates as _llava_templates

default_conversation = conv_vicuna_v1
conv_templates = _llava_templates | {"llava_v1": conv_vicuna_v1}

__all__ = ["Conversation", "conv_templates", "default_conversation"]
