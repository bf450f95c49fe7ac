"""The backbone that docs/adding_a_backbone.md shows, on a tiny random model whose decoder has a window."""

import functools
import inspect
import re
from dataclasses import replace
from typing import Any

import engine_checks
import pytest
import torch
from documents import ROOT
from engine_checks import Family
from transformers import (
    CLIPVisionConfig,
    Cohere2Config,
    Cohere2Model,
    LlavaConfig,
    LlavaForConditionalGeneration,
    MistralConfig,
    MistralModel,
)
from transformers.cache_utils import DynamicCache

import strategy
from strategy import VTRConfig, backbone
from strategy.kernels.layer_check import try_layers
from strategy.kernels.layer_spec import llama_spec
from strategy.kernels.llama_layer import fusion_blocker

DOCUMENT = ROOT / "docs/adding_a_backbone.md"
WINDOW = 128
IMAGE, SIDE = 63, 6  # the id of the placeholder token, and patches along a side of a picture
STAGES = {"prune_layer": [1, 4, 8], "ref_layers": 0}
DECODER = {"sliding_window": WINDOW, "head_dim": 16}


class Windowed(Family):
    """The documented family, whose cache keeps for each layer what lies in its window."""

    def cache(self) -> Any:
        return DynamicCache(config=self.decoder("sdpa").config)


@pytest.fixture(autouse=True)
def documented(monkeypatch):
    """The documented class, registered during one test."""
    [block] = re.findall(r"^```python\n(.*?)^```$", DOCUMENT.read_text(), re.MULTILINE | re.DOTALL)
    monkeypatch.setattr(backbone, "_backbones", dict(backbone._backbones))
    names: dict[str, Any] = {"__name__": "documented"}
    exec(compile(block, str(DOCUMENT), "exec"), names)
    assert len([line for line in block.splitlines() if line.strip()]) < 40
    return names["LlavaMistralBackbone"]


@pytest.fixture
def cohere2(documented) -> Family:
    """The second documented class, whose layers 3, 7, 11 and 15 see everything, and its tiny decoder."""
    [block] = re.findall(r"^```py\n(import torch\n.*?)^```$", DOCUMENT.read_text(), re.MULTILINE | re.DOTALL)
    names = {"LlavaMistralBackbone": documented, "register_backbone": strategy.register_backbone}
    exec(compile(block, str(DOCUMENT), "exec"), names)
    more = {"sliding_window": 2 * WINDOW, "num_hidden_layers": 16}
    return Windowed("llava_cohere2", None, Cohere2Model, Cohere2Config, more)


@pytest.mark.parametrize("layout", ["one image", "images of different size"])
def test_the_second_documented_class_prunes_behind_layers_that_see_everything(cohere2, layout, monkeypatch):
    batch = engine_checks.make(layout, 32)
    hidden = engine_checks.test_a_pruned_run_is_the_stock_one_with_the_pruned_tokens_hidden
    hidden(cohere2, batch, "divprune at 1", "sdpa")
    monkeypatch.setattr(engine_checks, "STAGES", {"prune_layer": [4, 8, 12], "ref_layers": 0})
    engine_checks.test_the_attention_that_strategies_see_is_that_of_the_stock_layers(cohere2, batch)
    engine_checks.test_hidden_states_and_attentions_shrink_with_the_sequence(cohere2, batch)
    engine_checks.test_each_sample_of_a_batch_keeps_what_it_would_keep_alone(cohere2, batch, "clse")
    monkeypatch.setattr(engine_checks, "STAGES", {"prune_layer": [4, 8, 11], "ref_layers": 0})
    with pytest.raises(ValueError, match="a Cohere2DecoderLayer with window attention and rotary embedding neighbours"):
        engine_checks.test_the_attention_that_strategies_see_is_that_of_the_stock_layers(cohere2, batch)


def test_the_second_documented_class_says_why_it_is_not_fused(cohere2):
    decoder = cohere2.decoder("sdpa")
    family = backbone.find_backbone(decoder, cohere2.name)
    specs = family.layer_specs(decoder)
    assert [spec.window for spec in specs[:4]] == [2 * WINDOW] * 3 + [None]
    assert fusion_blocker(decoder.layers, specs) == "a Cohere2DecoderLayer with another norm (layer)"
    assert try_layers(decoder, specs, family, fused=False).specs == specs


def test_the_documented_cache_is_that_of_these_tests():
    source = inspect.getsource(Windowed).replace(f'    """{Windowed.__doc__}"""\n\n', "").replace(" -> Any", "")
    assert f"```py\n{source}```" in DOCUMENT.read_text()


@pytest.fixture(scope="module")
def family() -> Family:
    # The shared checks let several tokens follow a prompt, in a window that holds all of them.
    return Windowed("llava_mistral", None, MistralModel, MistralConfig, DECODER | {"sliding_window": 2 * WINDOW})


@functools.cache
def llava(window: int | None) -> LlavaForConditionalGeneration:
    torch.manual_seed(0)
    vision = CLIPVisionConfig(
        hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=24, patch_size=4
    )
    text = MistralConfig(**engine_checks.TEXT | DECODER | {"sliding_window": window})
    config = LlavaConfig(text_config=text, vision_config=vision, image_token_id=IMAGE, vision_feature_layer=-1)
    return LlavaForConditionalGeneration._from_config(config, attn_implementation="sdpa").eval()


def prompts(before: int = 5, behind: int = 9) -> dict[str, torch.Tensor]:
    """Two prompts with a picture each."""
    torch.manual_seed(1)
    ids = torch.randint(3, IMAGE, (2, before + SIDE**2 + behind))
    ids[:, before : before + SIDE**2] = IMAGE
    pixels = torch.randn(2, 3, 24, 24)
    return {"input_ids": ids, "pixel_values": pixels, "attention_mask": torch.ones_like(ids)}


def answers(model: Any, given: dict[str, torch.Tensor], new: int) -> torch.Tensor:
    length = given["input_ids"].shape[1]
    return model.generate(**given, max_new_tokens=new, do_sample=False, eos_token_id=None, pad_token_id=0)[:, length:]


@pytest.mark.parametrize("layout", ["one image", "images of different size", "a video with class tokens"])
@pytest.mark.parametrize("name", ["clse", "sparsevlm", "divprune"])
def test_a_pruned_run_is_the_stock_one_with_the_pruned_tokens_hidden(family, layout, name):
    batch = engine_checks.make(layout, 32)
    assert batch.embeddings.shape[1] + engine_checks.STEPS < 2 * WINDOW
    check = engine_checks.test_a_pruned_run_is_the_stock_one_with_the_pruned_tokens_hidden
    check(family, batch, f"{name} at {engine_checks.first_layers(name)[-1]}", "sdpa")


def checks_of(*arguments: str) -> list[str]:
    """The shared checks that take these arguments and no others."""
    found = {name: check for name, check in vars(engine_checks).items() if name.startswith("test_")}
    return [name for name, check in found.items() if tuple(inspect.signature(check).parameters) == arguments]


@pytest.mark.parametrize("check", checks_of("family"))
def test_the_shared_checks_of_a_family_hold(family, check):
    getattr(engine_checks, check)(family)


@pytest.mark.parametrize("layout", ["padded on the left", "a video and an image"])
@pytest.mark.parametrize("check", checks_of("family", "batch"))
def test_the_shared_checks_of_batches_hold(family, check, layout):
    getattr(engine_checks, check)(family, engine_checks.make(layout, 32))


def test_a_family_without_published_outputs_leaves_that_check_out_and_says_so(family):
    with pytest.raises(pytest.skip.Exception, match="there are no published outputs of llava_mistral"):
        engine_checks.test_the_published_run(family, "sdpa")


@torch.no_grad()
def test_a_model_that_keeps_everything_or_is_detached_is_the_stock_model_to_the_bit():
    model, given = llava(WINDOW), prompts()
    logits, tokens = model(**given).logits, answers(model, given, 8)
    with strategy.prune(model, VTRConfig(retain_ratio=[1, 1, 1], **STAGES)) as run:
        assert torch.equal(model(**given).logits, logits)
        assert torch.equal(answers(model, given, 8), tokens)
    assert [(stage.before, stage.after) for stage in run.stages] == [(72, 72)] * 3
    with strategy.prune(model, VTRConfig(keep_tokens=[20, 12, 5], **STAGES)) as run:
        assert not torch.equal(model(**given, logits_to_keep=1).logits, logits[:, -1:])
    assert [stage.after for stage in run.stages] == [40, 24, 10]
    assert run.multiply_adds["vision"] > 0
    assert torch.equal(model(**given).logits, logits)


def test_the_layout_is_where_the_placeholders_are(documented):
    model, given = llava(WINDOW), prompts(before=3)
    given["input_ids"][1] = given["input_ids"][1].roll(4)
    spans = documented().layout(model, given)
    assert spans == [[strategy.Span(3, (1, SIDE, SIDE))], [strategy.Span(7, (1, SIDE, SIDE))]]
    assert documented().layout(model, {"input_ids": given["input_ids"]}) is None


def test_the_documented_spec_adds_the_window_that_the_default_does_not_see(documented, family):
    layer = family.decoder("sdpa").layers[0]
    assert (llama_spec(layer).attention, llama_spec(layer).window) == ("full", None)
    assert (documented().layer_spec(layer).attention, documented().layer_spec(layer).window) == ("window", 2 * WINDOW)
    spec = documented().layer_spec(llava(None).model.language_model.layers[0])
    assert (spec.attention, spec.window) == ("full", None)


def test_an_answer_may_fill_the_window_and_not_outgrow_it():
    model, given = llava(WINDOW), prompts(behind=80)
    room = WINDOW - given["input_ids"].shape[1]
    # The last token of an answer is not given to the decoder.
    with strategy.prune(model, VTRConfig(keep_tokens=[20, 12, 5], **STAGES)):
        inside = answers(model, given, room + 1)
        with pytest.raises(ValueError, match=f"have {WINDOW + 1} tokens, but some layers see a window of {WINDOW}"):
            answers(model, given, room + 2)
    unlimited = llava(None)
    unlimited.load_state_dict(model.state_dict())
    with strategy.prune(unlimited, VTRConfig(keep_tokens=[20, 12, 5], **STAGES)):
        assert torch.equal(answers(unlimited, given, room + 1), inside)
    # Unpruned, the stock model goes on, and its window slides.
    stock = answers(model, given, 2 * room)
    with strategy.prune(model, VTRConfig(enabled=False)):
        assert torch.equal(answers(model, given, 2 * room), stock)


@pytest.mark.parametrize("more", [-1, 0, 1])
def test_a_prompt_must_leave_room_in_the_window(more):
    model, given = llava(WINDOW), prompts(behind=WINDOW - 5 - SIDE**2 + more)
    assert given["input_ids"].shape[1] == WINDOW + more
    with strategy.prune(model, VTRConfig(keep_tokens=[20, 12, 5], **STAGES)) as run:
        if more < 0:
            assert answers(model, given, 2).shape == (2, 2)
            assert run.stages[-1].after == 10
        else:
            with pytest.raises(ValueError, match=f"allowed are prompts of fewer than {WINDOW} tokens"):
                answers(model, given, 1)


@pytest.mark.parametrize("change", [{"attention": "linear"}, {"rotary": "interleaved"}])
def test_attention_that_a_spec_cannot_express_is_refused_where_a_strategy_asks_for_it(documented, monkeypatch, change):
    plain = documented.layer_spec
    monkeypatch.setattr(documented, "layer_spec", lambda self, layer: replace(plain(self, layer), **change))
    model, given = llava(WINDOW), prompts()
    with (
        strategy.prune(model, VTRConfig(keep_tokens=[20, 12, 5], **STAGES)),
        pytest.raises(ValueError, match=next(iter(change.values()))),
    ):
        answers(model, given, 1)
    with strategy.prune(model, VTRConfig(strategy="divprune", keep_tokens=5, prune_layer=1)) as run:
        answers(model, given, 1)
    assert run.stages[0].after == 10
    with pytest.raises(ValueError, match=rf"engine=graph: .*{next(iter(change.values()))}"):
        strategy.attach(model, VTRConfig(engine="graph"))
