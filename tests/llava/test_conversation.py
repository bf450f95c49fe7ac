"""The prompt templates: their text, as published."""

import pytest

from llava.conversation import conv_templates

VICUNA = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)
LLAVA = (
    "A chat between a curious human and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the human's questions."
)


@pytest.mark.parametrize(("name", "system"), [("vicuna_v1", VICUNA), ("v1", VICUNA), ("llava_v1", LLAVA)])
def test_a_template_begins_with_its_published_text(name, system):
    conversation = conv_templates[name].copy()
    for role, text in zip(conversation.roles * 2, ("Hello?", "Yes.", "And?", None), strict=True):
        conversation.append_message(role, text)
    assert conversation.get_prompt() == f"{system} USER: Hello? ASSISTANT: Yes.</s>USER: And? ASSISTANT:"


def test_filling_in_a_template_leaves_all_templates_empty():
    conv_templates["llava_v1"].copy().append_message("USER", "Hello?")
    assert all(template.messages == [] for template in conv_templates.values())
    assert conv_templates["llava_v1"].messages is not conv_templates["vicuna_v1"].messages
