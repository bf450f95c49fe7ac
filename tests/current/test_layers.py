"""Layers of several kinds: which of them rank, and what a window allows."""

import warnings
from dataclasses import replace

import pytest
import torch
from current_models import FAMILIES, HEADS, TEXT
from test_model import config
from transformers import MistralConfig

import strategy
from strategy import VTRConfig
from strategy.backbone import find_backbone


def deep(name, layers):
    """A model of so many layers, without weights."""
    family = FAMILIES[name]
    types = (["linear_attention"] * 3 + ["full_attention"]) * (layers // 4)
    text = family.text | {"num_hidden_layers": layers, "layer_types": types}
    with torch.device("meta"):
        return family.kind(family.config(text_config=text, vision_config=family.vision, **family.more))


@pytest.mark.parametrize(
    ("layers", "name", "expected"),
    [
        (24, "clse", (4, 8, 16)),
        (32, "clse", (4, 12, 20)),
        (64, "clse", (4, 24, 44)),
        (24, "fastv", (4,)),
        (32, "pdrop", (8, 16, 24)),
        (24, "sparsevlm", (4, 8, 12)),
        (32, "priortr", (4,)),
        (24, "random", (4, 8, 16)),
        (24, "uniform", (0,)),
        (24, "divprune", (0,)),
    ],
)
def test_default_stages_move_to_the_nearest_layers_that_attend(layers, name, expected):
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        with strategy.prune(deep("qwen3_5", layers), VTRConfig(strategy=name)) as run:
            assert run.plan.layers == expected
    moved = [str(each.message) for each in said if "have attention to rank by" in str(each.message)]
    assert len(moved) == (expected != (0,) and (layers, name) != (32, "pdrop"))
    assert all(f"pruning at {list(expected)} in place of" in message for message in moved)


def test_a_decoder_with_too_few_such_layers_says_which_there_are():
    with pytest.raises(ValueError, match=r"only \[3, 7, 11\] have attention .* give prune_layer out of \[4, 8\]"):
        strategy.attach(FAMILIES["qwen3_5"].model(), VTRConfig())


def test_attention_of_a_linear_layer_is_refused_and_a_prune_without_it_is_not():
    family = FAMILIES["qwen3_5"]
    model, prompts = family.model(), family.of("one")
    with (
        strategy.prune(model, VTRConfig(strategy="fastv", prune_layer=2, retain_ratio=0.5)),
        pytest.raises(ValueError, match=r"a Qwen3_5DecoderLayer with linear attention .* prune at one of \[4, 8\]"),
    ):
        model.generate(**prompts.call, max_new_tokens=1)
    with strategy.prune(model, VTRConfig(strategy="divprune", prune_layer=2, retain_ratio=0.5)) as run:
        model.generate(**prompts.call, max_new_tokens=3, do_sample=False)
    assert [(stage.before, stage.after) for stage in run.stages] == [(24, 12)]


def test_what_linear_layers_keep_counts_as_cache_and_costs_no_pairs():
    family = FAMILIES["qwen3_5"]
    model, prompts = family.model(), family.of("one")
    facts = find_backbone(model).facts(family.decoder(model))
    assert facts.attention_layers == (3, 7, 11)
    assert (
        0
        < facts.pair_cost
        < find_backbone(FAMILIES["qwen3_vl"].model()).facts(FAMILIES["qwen3_vl"].model().model.language_model).pair_cost
    )
    with torch.no_grad(), strategy.prune(model, config(family)) as run:
        cache = model(**prompts.call, use_cache=True).cache
    held = sum(
        tensor.nbytes
        for layer in cache.layers
        for value in vars(layer).values()
        for tensor in (value.values() if isinstance(value, dict) else [value])
        if torch.is_tensor(tensor)
    )
    assert run.means()["cache_bytes"] == held


@pytest.mark.parametrize("more", [-1, 0])
@pytest.mark.parametrize("name", ["gemma3", "paligemma2"])
def test_a_prompt_must_leave_room_in_the_window(name, more):
    family = FAMILIES[name]
    model, prompts = family.model(), family.make([[12, [1], 256 - 12 - 38 + more]])
    assert prompts.length == 256 + more
    with strategy.prune(model, config(family)) as run:
        if more < 0:
            model.generate(**prompts.call, max_new_tokens=2, do_sample=False)
            assert run.samples == 1
            with pytest.raises(ValueError, match="have 257 tokens, but some layers see a window of 256"):
                model.generate(**prompts.call, max_new_tokens=3, do_sample=False)
        else:
            with pytest.raises(ValueError, match="allowed are prompts of fewer than 256 tokens"):
                model.generate(**prompts.call, max_new_tokens=1)


def test_a_mistral_behind_a_tower_has_a_window():
    family = FAMILIES["llava_hf"]
    text = MistralConfig(**TEXT, **HEADS, sliding_window=60)
    family = replace(family, text=text)
    model, prompts = family.model(), family.make([[12, [1], 60 - 12 - 38]])
    with (
        strategy.prune(model, VTRConfig(strategy="uniform", keep_tokens=96, engine="eager")),
        pytest.raises(ValueError, match="allowed are prompts of fewer than 60 tokens"),
    ):
        model.generate(**prompts.call, max_new_tokens=1)
