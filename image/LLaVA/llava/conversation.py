"""Prompt templates: they turn a conversation into the text that the model was trained on."""

import copy as _copy
from dataclasses import dataclass, field, replace


@dataclass
class Conversation:
    """A conversation in the format of one template.

    Attributes:
        system: The text before the first turn.
        roles: The names of the user and of the assistant.
        sep: What follows the system text and each turn of the first role.
        sep2: What follows each turn of the second role.
        version: The name of the template.
        messages: [role, message] pairs; with None as the message, the model completes the turn.
    """

    system: str
    roles: tuple[str, str]
    sep: str
    sep2: str
    version: str
    messages: list[list[str | None]] = field(default_factory=list)

    def append_message(self, role: str, message: str | None) -> None:
        """Add a turn."""
        self.messages.append([role, message])

    def get_prompt(self) -> str:
        """Return the conversation as the text to be tokenised."""
        text = self.system + self.sep
        for turn, (role, message) in enumerate(self.messages):
            text += f"{role}: {message}{(self.sep, self.sep2)[turn % 2]}" if message else f"{role}:"
        return text

    def copy(self) -> "Conversation":
        """Return a copy to fill in, so that the template itself stays empty."""
        return _copy.deepcopy(self)


conv_vicuna_v1 = Conversation(
    system="A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions.",
    roles=("USER", "ASSISTANT"),
    sep=" ",
    sep2="</s>",
    version="v1",
)

# What Video-LLaVA was trained with.
conv_llava_v1 = replace(
    conv_vicuna_v1,
    system="A chat between a curious human and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the human's questions.",
    messages=[],
)

default_conversation = conv_vicuna_v1
conv_templates = {
    "default": conv_vicuna_v1,
    "v1": conv_vicuna_v1,
    "vicuna_v1": conv_vicuna_v1,
    "llava_v1": conv_llava_v1,
}
