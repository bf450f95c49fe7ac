"""What PaliGemma has that no other family has: prefixes that see themselves both ways, windows and soft caps."""

import dataclasses

import engine_checks
import pytest
import torch
from current_models import FAMILIES, HEADS
from test_model import config
from transformers import Gemma2Config, Gemma2Model
from transformers.cache_utils import DynamicCache

import strategy
from strategy import VTRConfig
from strategy.backbone import find_backbone

NAMES = ["paligemma", "paligemma2"]
WINDOW = 256
DECODER = HEADS | {
    "sliding_window": WINDOW,
    "query_pre_attn_scalar": 16,
    "attn_logit_softcapping": None,
    "final_logit_softcapping": None,
}


class Windowed(engine_checks.Family):
    """Gemma 2 as a bare decoder, with the cache that its windows need; transformers has no sdpa for it."""

    def decoder(self, attention):
        return super().decoder("eager")

    def cache(self):
        return DynamicCache(config=self.decoder("eager").config)


@pytest.fixture(scope="module")
def family():
    return Windowed("paligemma", None, Gemma2Model, Gemma2Config, DECODER)


@pytest.mark.parametrize("layout", ["one image", "images of different size", "padded on the left"])
@pytest.mark.parametrize("name", ["clse", "sparsevlm", "divprune"])
def test_the_bare_decoder_is_the_stock_one_with_the_pruned_tokens_hidden(family, layout, name):
    batch = engine_checks.make(layout, 32)
    case = f"{name} at {engine_checks.first_layers(name)[-1]}"
    engine_checks.test_a_pruned_run_is_the_stock_one_with_the_pruned_tokens_hidden(family, batch, case, "eager")


@pytest.mark.parametrize("layout", ["one image", "padded on the left"])
def test_the_attention_of_the_bare_decoder_is_that_of_its_layers(family, layout):
    batch = engine_checks.make(layout, 32)
    engine_checks.test_the_attention_that_strategies_see_is_that_of_the_stock_layers(family, batch)


@torch.no_grad()
@pytest.mark.parametrize("kind", ["one", "several"])
@pytest.mark.parametrize("name", NAMES)
def test_strategies_see_attention_both_ways(name, kind):
    tiny, seen = FAMILIES[name], []
    model, prompts = tiny.model("eager"), tiny.of(kind)
    call = tiny.longer(prompts, torch.zeros(1, 0, dtype=torch.long))

    def watch(view, *_):
        # A text token in front of the picture sees the picture too.
        first = torch.zeros_like(view.last)
        seen.append((view, *((at, view.attention(at)) for at in (first, view.question, view.last))))

    with strategy.prune(model, config(tiny), watch=watch) as run:
        attentions = model(**call, output_attentions=True, use_cache=True).attentions
    assert len(seen) == len(run.stages) == 3
    for (view, *rows), stage in zip(seen, run.stages, strict=True):
        stock = attentions[stage.layer - 1][0]
        for at, own in rows:
            assert own[0].min() > 0
            torch.testing.assert_close(own[0], stock[:, at[0]][:, :, view.visual[0]], rtol=0, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("name", NAMES)
def test_the_prompt_without_its_question_sees_itself_both_ways(name):
    tiny, priors = FAMILIES[name], []
    model, prompts = tiny.model("eager"), tiny.of("one")
    call = tiny.longer(prompts, torch.zeros(1, 0, dtype=torch.long))
    visual = prompts.visual[0]
    with strategy.prune(model, config(tiny, "priortr_2f"), watch=lambda view, *_: priors.append(view.prior)) as run:
        model(**call, use_cache=True)
    end = int(visual[-1]) + 2
    shorter = {n: v if n == "pixel_values" else v[:, :end] for n, v in call.items()}
    stock = model(**shorter, output_attentions=True).attentions[run.stages[0].layer - 1]
    torch.testing.assert_close(priors[0][0], stock[0, :, -1, visual], rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_each_layer_is_described(name):
    model = FAMILIES[name].model()
    specs = find_backbone(model).layer_specs(model.model.language_model)
    second = name == "paligemma2"
    assert [spec.window for spec in specs] == ([WINDOW, None] if second else [None, None]) * 6
    assert {spec.post_attention_norm for spec in specs} == {
        "pre_feedforward_layernorm" if second else "post_attention_layernorm"
    }
    assert all(spec.has_rows for spec in specs)


def test_soft_caps_are_refused_where_a_strategy_asks_for_attention():
    plain = FAMILIES["paligemma2"]
    text = Gemma2Config(**plain.text.to_dict() | {"attn_logit_softcapping": 0.5})
    tiny = dataclasses.replace(plain, text=text)
    model, prompts = tiny.model(), tiny.of("batch")
    with (
        strategy.prune(model, config(tiny)),
        pytest.raises(ValueError, match="a Gemma2DecoderLayer with soft-capped attention"),
    ):
        model.generate(**prompts.call, max_new_tokens=1)
    with strategy.prune(model, VTRConfig(strategy="divprune", prune_layer=2, retain_ratio=0.5)) as run:
        model.generate(**prompts.call, max_new_tokens=3, do_sample=False)
    assert [(stage.before, stage.after) for stage in run.stages] == [(108, 54)]


def test_an_unpruned_answer_may_outgrow_the_window():
    tiny = FAMILIES["paligemma2"]
    model, prompts = tiny.model(), tiny.make([[12, [1], WINDOW - 12 - 38]])
    options = {"max_new_tokens": 8, "do_sample": False}
    stock = model.generate(**prompts.call, **options)
    with strategy.prune(model, VTRConfig(enabled=False)):
        assert torch.equal(model.generate(**prompts.call, **options), stock)
