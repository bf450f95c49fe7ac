"""What a backbone's file says about its models and prompts."""

import random
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

LAYERS = 12  # of a small decoder: as many as the strategies' default stages need


class Prompt(NamedTuple):
    """One prompt.

    Attributes:
        ids: Token ids.
        visuals: The arguments of `generate` that hold pixels or describe them.
        visual: How many visual tokens the prompt has.
        tokens: How many tokens it has, the visual ones included.
    """

    ids: list[int]
    visuals: dict[str, Any]
    visual: int
    tokens: int


class Family(NamedTuple):
    """Creates a backbone's model and prompt on torch's default device.

    Attributes:
        create: Returns a model, given its dtype and whether it shall be small.
        prompt: Returns a prompt, given the model and the dtype of the pixels.
        argument: The argument of `generate` for token ids.
    """

    create: Callable[[torch.dtype, bool], Any]
    prompt: Callable[[Any, torch.dtype], Prompt]
    argument: str


def text_ids(count: int, end: int) -> list[int]:
    """Return ids of `count` tokens of text, above the special tokens of Llama and below those from `end` on."""
    draw = random.Random(count)
    return [draw.randrange(3, end) for _ in range(count)]
