"""What a pruned model cannot give is refused in one sentence, and what it leaves unpruned it says and counts.

A backbone's tests import everything from here and give a fixture `asked`, an `Asked`.
"""

import copy
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from engine_checks import all_hooks
from transformers.cache_utils import DynamicCache

import strategy
from strategy import VTRConfig
from strategy.kernels import kv_cache

SENTENCE = "is not supported while a model is pruned"
PRUNED = VTRConfig(strategy="fastv", retain_ratio=0.5)
UNSUPPORTED = {
    "prompt_lookup_num_tokens": 2,
    "penalty_alpha": 0.6,
    "dola_layers": "low",
    "assistant_early_exit": 2,
    "prefill_chunk_size": 8,
}
CACHES = ["static", "offloaded", "offloaded_static", "sliding_window", "hybrid", "quantized", "paged", "nonsense"]
WANTED = [*UNSUPPORTED.items(), *(("cache_implementation", name) for name in CACHES)]


@dataclass
class Asked:
    """A model and a prompt with a picture or video behind a system turn.

    call: The keyword arguments of a prompt, for `generate` and forward calls. system: Token ids [1, S] that begin it.
    caches: Makes caches by hand that no prune can trim.
    """

    model: Any
    call: dict[str, Any]
    system: torch.Tensor
    caches: Callable[[], list[Any]]

    def answer(self, **options: Any) -> torch.Tensor:
        return self.model.generate(**self.call, **{"max_new_tokens": 3, "do_sample": False} | options)


def is_right_afterwards(asked: Asked, run: Any, answer: torch.Tensor) -> None:
    before = run.samples
    assert torch.equal(asked.answer(), answer)
    assert run.samples == before + 1


@pytest.mark.parametrize(("name", "value"), WANTED, ids=str)
def test_an_unsupported_option_of_generate_is_one_sentence(asked, name, value):
    model = asked.model
    hooks = all_hooks(model)
    with strategy.prune(model, PRUNED) as run:
        answer = asked.answer()
        with pytest.raises(ValueError, match=rf"^{name}='?{value}'? {SENTENCE}: use [^\n]*$"):
            asked.answer(**{name: value})
        config = copy.deepcopy(model.generation_config)
        setattr(config, name, value)
        with pytest.raises(ValueError, match=f"^{name}=.* {SENTENCE}"):
            asked.answer(generation_config=config)
        stored, model.generation_config = model.generation_config, config
        try:
            with pytest.raises(ValueError, match=f"^{name}=.* {SENTENCE}"):
                asked.answer()
        finally:
            model.generation_config = stored
        is_right_afterwards(asked, run, answer)
    assert all_hooks(model) == hooks
    assert "generate" not in vars(model)


def test_assisted_decoding_is_refused_for_either_part(asked):
    assistant = copy.deepcopy(asked.model)
    with strategy.prune(asked.model, PRUNED) as run:
        answer = asked.answer()
        with pytest.raises(ValueError, match=rf"^assistant_model={type(assistant).__name__} {SENTENCE}: use [^\n]*$"):
            asked.answer(assistant_model=assistant)
        is_right_afterwards(asked, run, answer)
        config = copy.deepcopy(asked.model.generation_config)
        config.is_assistant = True
        with pytest.raises(ValueError, match=f"^is_assistant=True {SENTENCE}"):
            asked.answer(generation_config=config)
        is_right_afterwards(asked, run, answer)


@pytest.mark.parametrize("config", [PRUNED, VTRConfig()])
def test_a_loss_is_refused(asked, config):
    ids = asked.call["input_ids"]
    with strategy.prune(asked.model, config) as run:
        answer = asked.answer()
        with pytest.raises(ValueError, match=rf"^labels= {SENTENCE}, since [^\n]*$"):
            asked.model(**asked.call, labels=ids)
        with pytest.raises(ValueError, match=rf"^logits_to_keep= as indices of tokens {SENTENCE}"):
            asked.model(**asked.call, logits_to_keep=torch.tensor([3]))
        is_right_afterwards(asked, run, answer)


@torch.no_grad()
def test_a_cache_that_cannot_be_trimmed_is_refused(asked):
    count = len(asked.caches())
    assert count
    with strategy.prune(asked.model, PRUNED) as run:
        answer = asked.answer()
        for number in range(count):
            cache = asked.caches()[number]
            words = rf"^past_key_values: a {type(cache).__name__} {SENTENCE}: use a DynamicCache, or leave it out$"
            with pytest.raises(ValueError, match=words):
                asked.model(**asked.call, past_key_values=cache, use_cache=True)
            is_right_afterwards(asked, run, answer)
        asked.model(**asked.call, past_key_values=DynamicCache(), use_cache=True)


def test_what_a_prune_allows_is_not_refused(asked):
    with strategy.prune(asked.model, PRUNED):
        answer = asked.answer()
        config = copy.deepcopy(asked.model.generation_config)
        config.prompt_lookup_num_tokens, config.cache_implementation = None, None
        assert torch.equal(asked.answer(generation_config=config), answer)
    with strategy.prune(asked.model, VTRConfig(enabled=False, engine="eager")):
        assert "generate" not in vars(asked.model)


@torch.no_grad()
def behind_a_system_turn(asked: Asked, answers: int) -> list[Any]:
    """Cache the system turn by a forward call, then answer on this cache; several times."""
    said = []
    for _ in range(answers):
        cache = DynamicCache()
        asked.model(input_ids=asked.system, past_key_values=cache, use_cache=True)
        assert kv_cache.length(cache) == asked.system.shape[1]
        said.append(asked.answer(past_key_values=cache))
    return said


def test_a_picture_behind_a_filled_cache_is_said_and_counted(asked):
    with strategy.prune(asked.model, VTRConfig(enabled=False)):
        expected = behind_a_system_turn(asked, 1)[0]
    with strategy.prune(asked.model, PRUNED) as run:
        with pytest.warns(UserWarning, match="visual tokens that follow a filled cache are not pruned: ") as told:
            answers = behind_a_system_turn(asked, 3)
        assert len([each for each in told if "filled cache" in str(each.message)]) == 1
        assert all(torch.equal(answer, expected) for answer in answers)
        assert (run.samples, run.unpruned_samples) == (0, 3)
        assert "3 more with visual tokens behind a filled cache, which were not pruned" in run.summary()
        asked.answer()
        assert (run.samples, run.unpruned_samples) == (1, 3)


def test_a_prompt_in_one_call_and_its_answer_are_not_warned_of(asked):
    with strategy.prune(asked.model, PRUNED) as run, warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        asked.answer()
        assert run.unpruned_samples == 0
        assert "filled cache" not in run.summary()


def test_a_copy_of_an_attached_model_answers_and_refuses_by_itself(asked):
    with strategy.prune(asked.model, VTRConfig(strategy="fastv", retain_ratio=0.5, engine="eager")):
        answer, other = asked.answer(), copy.deepcopy(asked.model)
    with torch.no_grad():
        for parameter in asked.model.get_output_embeddings().parameters():
            parameter.neg_()
        try:
            assert torch.equal(Asked(other, asked.call, asked.system, asked.caches).answer(), answer)
        finally:
            parameter.neg_()
    with pytest.raises(ValueError, match=f"^prompt_lookup_num_tokens=2 {SENTENCE}"):
        other.generate(**asked.call, prompt_lookup_num_tokens=2)
    assert "generate" not in vars(asked.model)
