"""What a backbone's file says about its models, prompts and pictures."""

import random
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
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


class Preparation(NamedTuple):
    """How prompts come from pictures or clips on disk.

    Attributes:
        suffix: With which a file's name ends.
        write: Writes a file of random colours, given its path and a seed.
        prepare: Returns the arguments of `generate` on the CPU, given the files of a batch, as the lmms-eval model or
            the video script prepares them. The text is that of the case.
        ahead: Yields them for each of several batches, prepared by so many threads ahead, as there.
        tokenizer: Which decodes the answers, see `words.word_tokenizer`.
    """

    suffix: str
    write: Callable[[Path, int], None]
    prepare: Callable[[Sequence[Path]], Mapping[str, Any]]
    ahead: Callable[[Iterable[Sequence[Path]], int], Generator[Mapping[str, Any], None, None]]
    tokenizer: Any


class Family(NamedTuple):
    """Creates a backbone's model and prompt on torch's default device.

    Attributes:
        create: Returns a model, given its dtype and whether it shall be small.
        prompt: Returns a prompt, given the model and the dtype of the pixels.
        argument: The argument of `generate` for token ids.
        preparation: Returns how prompts are prepared, given the model and the token ids of its prompt.
        sized: By what can vary of a prompt, "visual" (tokens of a picture) or "frames" (of a video), what returns a
            prompt of so many, given the model, the dtype of the pixels and the number.
    """

    create: Callable[[torch.dtype, bool], Any]
    prompt: Callable[[Any, torch.dtype], Prompt]
    argument: str
    preparation: Callable[[Any, Sequence[int]], Preparation]
    sized: Mapping[str, Callable[[Any, torch.dtype, int], Prompt]] = MappingProxyType({})


def text_ids(count: int, end: int) -> list[int]:
    """Return ids of `count` tokens of text, above the special tokens of Llama and below those from `end` on."""
    draw = random.Random(count)
    return [draw.randrange(3, end) for _ in range(count)]
