"""The backbone of docs/adding_a_backbone.md for transformers 5.24, on a tiny random model."""

import re

import pytest
from current_models import TILE_PROMPTS, TOWER, Family, tiled
from documents import ROOT
from qwen_checks import IMAGE, TEXT
from test_model import config, test_generate_is_the_stock_model_with_the_pruned_tokens_hidden
from transformers import CLIPVisionConfig, LlamaConfig, VipLlavaConfig, VipLlavaForConditionalGeneration

import strategy
from strategy import backbone

DOCUMENT = ROOT / "docs/adding_a_backbone.md"
VIP = Family(
    VipLlavaForConditionalGeneration,
    VipLlavaConfig,
    LlamaConfig(**TEXT),
    CLIPVisionConfig(**TOWER, image_size=24),
    tiled(6, 24),
    TILE_PROMPTS,
    {"image_token_index": IMAGE, "vision_feature_layers": [-2, -1]},
)
check = test_generate_is_the_stock_model_with_the_pruned_tokens_hidden
del test_generate_is_the_stock_model_with_the_pruned_tokens_hidden  # it runs for the families of this environment


@pytest.fixture
def documented(monkeypatch):
    """The documented class, registered during one test."""
    [block] = re.findall(r'^```py\n("""ViP-LLaVA.*?)^```$', DOCUMENT.read_text(), re.MULTILINE | re.DOTALL)
    monkeypatch.setattr(backbone, "_backbones", dict(backbone._backbones))
    exec(compile(block, str(DOCUMENT), "exec"), {"__name__": "documented"})
    assert len([line for line in block.splitlines() if line.strip()]) < 60


def test_an_unknown_model_is_told_what_is_missing():
    words = "VipLlavaForConditionalGeneration belongs to no backbone .* with name, models, .* layout, rotary, and pass"
    with pytest.raises(ValueError, match=words):
        strategy.attach(VIP.model(), strategy.VTRConfig())


@pytest.mark.parametrize("kind", ["one", "batch"])
@pytest.mark.parametrize("name", ["clse", "sparsevlm"])
@pytest.mark.usefixtures("documented")
def test_the_documented_class_prunes_as_the_stock_model_with_hidden_tokens(kind, name):
    check(VIP, VIP.of(kind), name, "sdpa")


@pytest.mark.usefixtures("documented")
def test_the_documented_class_answers_by_graphs_too():
    model, prompts, tokens = VIP.model(), VIP.of("one"), []
    for engine in ("eager", "graph"):
        with strategy.prune(model, config(VIP, engine=engine)):
            tokens.append(model.generate(**prompts.call, max_new_tokens=8, do_sample=False).tolist())
    assert tokens[0] == tokens[1]
