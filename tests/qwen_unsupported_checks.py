"""What `unsupported_checks` check, and what is a Qwen's own, on tiny random models.

A backbone's tests import everything from here and have a fixture `tiny`, a `qwen_checks.Tiny`.
"""

import pytest
import torch
from qwen_checks import PROMPTS, Tiny, make
from transformers import cache_utils
from unsupported_checks import *  # noqa: F403
from unsupported_checks import PRUNED, Asked

import strategy


@pytest.fixture
def asked(tiny: Tiny) -> Asked:
    model, call = tiny.model("sdpa"), make(PROMPTS["one image"], tiny.stamp).call
    options = {"config": model.config.get_text_config(), "max_cache_len": 128}

    def caches():
        plain = cache_utils.DynamicCache
        made = [cache_utils.StaticCache(**options), cache_utils.EncoderDecoderCache(plain(), plain())]
        # Some versions have these, too.
        named = (getattr(cache_utils, name, None) for name in ("HybridCache", "SlidingWindowCache"))
        return made + [kind(**options) for kind in named if kind]

    return Asked(model, call, call["input_ids"][:, :5], caches)


@torch.no_grad()
def test_a_loss_is_refused_as_a_positional_argument(asked):
    ids = asked.call["input_ids"]
    with strategy.prune(asked.model, PRUNED), pytest.raises(ValueError, match=r"^labels= is not supported"):
        asked.model(ids, None, None, None, None, ids)


@torch.no_grad()
def test_a_picture_that_a_call_by_hand_gives_behind_a_cache_is_said_and_read(asked):
    call = {name: value for name, value in asked.call.items() if name != "attention_mask"}
    behind = call | {"input_ids": call["input_ids"][:, asked.system.shape[1] :]}

    def logits(scale):
        cache = cache_utils.DynamicCache()
        asked.model(input_ids=asked.system, past_key_values=cache, use_cache=True)
        given = behind | {"pixel_values": scale * behind["pixel_values"]}
        return asked.model(**given, past_key_values=cache).logits

    expected = logits(1)
    with strategy.prune(asked.model, PRUNED) as run:
        with pytest.warns(UserWarning, match="visual tokens that follow a filled cache are not pruned"):
            assert torch.equal(logits(1), expected)
        assert not torch.allclose(logits(-1), expected)
    assert (run.samples, run.unpruned_samples) == (0, 2)
