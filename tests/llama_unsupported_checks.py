"""What `unsupported_checks` check, and what is a Llama's own, in transformers 4.37.

A backbone's tests import everything from here and give a fixture `asked`, an `Asked` that `asked_of` made.
"""

from typing import Any

import pytest
import torch
from transformers.cache_utils import DynamicCache, SinkCache
from unsupported_checks import *  # noqa: F403
from unsupported_checks import PRUNED, Asked

import strategy
from llava.constants import IMAGE_TOKEN_INDEX


def asked_of(model: Any, pixels: Any, frames: int) -> Asked:
    """A prompt of random text around a picture, or the frames of a video."""
    text = torch.randint(3, 300, (20,), generator=torch.Generator().manual_seed(0)).tolist()
    ids = torch.tensor([[1, *text[:12], *[IMAGE_TOKEN_INDEX] * frames, *text[12:]]])
    model.generation_config.pad_token_id = 0
    return Asked(model, {"input_ids": ids, "images": pixels}, ids[:, :7], lambda: [SinkCache(4096, 4)])


@torch.no_grad()
def test_a_picture_of_a_later_turn_is_said_and_that_of_an_earlier_one_is_not(asked):
    first, more = asked.call["input_ids"], torch.tensor([[9, 10, 11]])
    picture = first[first == IMAGE_TOKEN_INDEX][None]
    with strategy.prune(asked.model, PRUNED) as run:
        cache = DynamicCache()
        answer = asked.answer(past_key_values=cache)
        words = torch.cat([first, answer, more], dim=1)
        asked.model.generate(words, images=asked.call["images"], past_key_values=cache, max_new_tokens=2)
        assert (run.samples, run.unpruned_samples) == (1, 0)
        cache = DynamicCache()
        answer = asked.answer(past_key_values=cache)
        both = [*asked.call["images"], *asked.call["images"]]
        with pytest.warns(UserWarning, match="visual tokens that follow a filled cache are not pruned"):
            asked.model.generate(
                torch.cat([first, answer, more, picture, more], dim=1),
                images=both if isinstance(asked.call["images"], list) else torch.stack(both),
                past_key_values=cache,
                max_new_tokens=2,
            )
        assert (run.samples, run.unpruned_samples) == (2, 1)
