"""Decoders whose layers see a window: answers are the stock model's, and no prune changes a window unnoticed."""

from pathlib import Path

import pytest
import torch
from engine_checks import STEPS, make
from transformers import AutoConfig, DynamicCache, Qwen2VLForConditionalGeneration

import strategy
from strategy import VTRConfig
from strategy.attach import attachment_of

CHECKPOINT = Path(__file__).parents[2] / "examples/shapes/checkpoints/shapes-qwen2"


def windowed(text, window, every=1):
    """Let every layer, or each second or third, see a window."""
    kinds = ["full_attention" if number % every else "sliding_attention" for number in range(text.num_hidden_layers)]
    text.use_sliding_window, text.sliding_window, text.layer_types = True, window, kinds
    return text


@pytest.fixture(scope="module")
def model():
    config = AutoConfig.from_pretrained(CHECKPOINT)
    windowed(config.text_config, 8, every=2)
    return Qwen2VLForConditionalGeneration.from_pretrained(CHECKPOINT, config=config, dtype=torch.float32).eval()


def answers(model, length):
    ids = torch.randint(
        model.config.text_config.vocab_size - 20, (1, length), generator=torch.Generator().manual_seed(0)
    )
    ids = ids.masked_fill((ids == model.config.image_token_id) | (ids == model.config.video_token_id), 0)
    given = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "eos_token_id": None}
    return model.generate(**given, do_sample=False, max_new_tokens=24)


def test_beyond_the_window_the_stock_loop_answers_and_says_why(model):
    stock = answers(model, 40)
    with strategy.prune(model, VTRConfig(enabled=False, engine="eager")):
        assert torch.equal(answers(model, 40), stock)
    with strategy.prune(model, VTRConfig(enabled=False, engine="graph")) as run:
        with pytest.warns(UserWarning, match="prompt and answer may outgrow the 8 tokens that a layer sees"):
            assert torch.equal(answers(model, 40), stock)
        assert "answer: stock loop (prompt and answer may outgrow the 8 tokens" in run.graph_report()


def test_layers_are_described_one_by_one(model):
    specs = strategy.backbone.find_backbone(model).layer_specs(model.model.language_model)
    assert [spec.window for spec in specs[:4]] == [8, None, 8, None]
    assert [spec.attention for spec in specs[:4]] == ["window", "full", "window", "full"]


@pytest.fixture
def decoders(family):
    """The same decoder without and with a window of 150 tokens at each second layer."""
    plain = family.decoder("sdpa")
    text = windowed(type(plain.config)(**plain.config.to_dict()), 150, every=2)
    other = family.kind._from_config(text, attn_implementation="sdpa").eval()
    other.load_state_dict(plain.state_dict())
    return plain, other


def run(family, decoder, batch, cache, config):
    later = torch.randn(1, STEPS, batch.embeddings.shape[2], generator=torch.Generator().manual_seed(1))
    outputs = []
    with strategy.prune(decoder, config, backbone=family.name, layout=batch.layout) as record:
        outputs.append(family.run(decoder, batch.embeddings, None, None, cache))
        outputs += [family.run(decoder, later[:, at : at + 1], None, None, cache) for at in range(STEPS)]
    return outputs, record


@pytest.mark.parametrize("name", ["clse", "fastv", "divprune"])
def test_inside_the_window_a_prune_is_what_it_is_without_one(family, decoders, name):
    plain, other = decoders
    batch = make("one image", plain.config.hidden_size)
    config = VTRConfig(strategy=name, keep_tokens=[20, 12, 5], prune_layer=[1, 4, 8])
    expected, stages = run(family, plain, batch, DynamicCache(), config)
    outputs, record = run(family, other, batch, DynamicCache(config=other.config), config)
    for own, wanted in zip(outputs, expected, strict=True):
        torch.testing.assert_close(own, wanted, rtol=0, atol=1e-5)
    for own, wanted in zip(record.stages, stages.stages, strict=True):
        assert torch.equal(own.kept[0], wanted.kept[0])


def test_a_prune_beyond_the_window_is_refused_and_leaves_the_model_usable(family, decoders):
    _, other = decoders
    batch, long = (make("one image", other.config.hidden_size) for _ in range(2))
    long.embeddings = torch.cat([long.embeddings, long.embeddings], dim=1)
    config = VTRConfig(keep_tokens=[20, 12, 5], prune_layer=[1, 4, 8])
    with strategy.prune(other, config, backbone=family.name, layout=batch.layout):
        with pytest.raises(ValueError, match="have 220 tokens, but some layers see a window of 150"):
            family.run(other, long.embeddings, None, None, DynamicCache(config=other.config))
        cache = DynamicCache(config=other.config)
        family.run(other, batch.embeddings, None, None, cache)
        later = batch.embeddings[:, :41]
        with pytest.raises(ValueError, match="prompt and answer have 151 tokens"):
            family.run(other, later, None, None, cache)
        assert attachment_of(other).record.prompts == 1
    with strategy.prune(other, VTRConfig(enabled=False), backbone=family.name, layout=[[]]):
        family.run(other, long.embeddings, None, None, DynamicCache(config=other.config))
