"""What strategies see of LLaVA's vision tower is what the stock tower computes."""

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from encoder_checks import *  # noqa: F403
from test_fast import small

import strategy
from strategy import VTRConfig
from strategy.base import EncoderView


@pytest.fixture(scope="module")
def asked():
    return small("cpu")


def stock(asked, pixels) -> EncoderView:
    """What the stock tower computes of pictures, by its own attention matrices."""
    clip = asked.model.get_vision_tower().vision_tower
    with torch.no_grad():
        output = clip(pixels, output_hidden_states=True, output_attentions=True)
        layer, before = clip.vision_model.encoder.layers[-2], output.hidden_states[-3]
        keys = layer.self_attn.k_proj(layer.layer_norm1(before)).unflatten(-1, (layer.self_attn.num_heads, -1))
    return EncoderView(output.attentions[-2][:, :, 0, 1:], keys[:, 1:].transpose(1, 2), output.hidden_states[-2][:, 1:])


def same(own, expected, rtol=0):
    for name in ("attention", "keys", "features"):
        torch.testing.assert_close(getattr(own, name), getattr(expected, name), rtol=rtol, atol=1e-5)


def pick(view, numbers):
    """The pictures of those numbers, as those of one sample."""
    return EncoderView(
        torch.cat([view.attention[n : n + 1] for n in numbers], dim=2),
        torch.cat([view.keys[n : n + 1] for n in numbers], dim=2),
        torch.cat([view.features[n : n + 1] for n in numbers], dim=1),
    )


@pytest.mark.parametrize("engine", ["eager", "graph"])
@pytest.mark.parametrize("kind", ["one", "several", "mixed"])
def test_each_sample_is_given_its_own_pictures(asked, looks, kind, engine):
    prompts = asked.prompts[kind]
    expected = stock(asked, prompts["images"])
    pictures = {"one": [[0]], "several": [[0], [1], [2]], "mixed": [[0], [], [1, 2]]}[kind]
    with strategy.prune(asked.model, VTRConfig(strategy="looks", keep_tokens=64, engine=engine)):
        for _ in range(2):
            looks.clear()
            asked.model.generate(**prompts, max_new_tokens=2, do_sample=False)
            assert sorted(sample for view in looks for sample in view.samples) == [
                sample for sample, own in enumerate(pictures) if own
            ]
            for view in looks:
                for row, sample in enumerate(view.samples):
                    alone = EncoderView(*(tensor[row : row + 1] for tensor in vars(view.encoder).values()))
                    # The graph engine computes the tower's attention by another kernel.
                    same(alone, pick(expected, pictures[sample]), rtol=1e-5 if engine == "graph" else 0)


def test_beams_see_the_pictures_of_their_prompt(asked, looks):
    prompts = asked.prompts["several"]
    expected = stock(asked, prompts["images"])
    with strategy.prune(asked.model, VTRConfig(strategy="looks", keep_tokens=64)):
        asked.model.generate(**prompts, max_new_tokens=2, num_beams=2, do_sample=False)
        [view] = looks
        assert view.samples == tuple(range(6))
        same(view.encoder, EncoderView(*(tensor.repeat_interleave(2, 0) for tensor in vars(expected).values())))


@torch.no_grad()
def test_prompts_may_be_prefilled_again_without_encoding_their_pictures_again(asked, looks):
    prompts = asked.prompts["several"]
    expected = stock(asked, prompts["images"])
    with strategy.prune(asked.model, VTRConfig(strategy="looks", keep_tokens=64)):
        parts = asked.model.embed_prompts(prompts["inputs"], prompts["attention_mask"], prompts["images"])
        given = dict(zip(("inputs_embeds", "attention_mask", "visual_layout"), parts, strict=True))
        for _ in range(2):
            asked.model(**given)
            same(looks[-1].encoder, expected)
    assert len(looks) == 2


def test_later_stages_see_what_is_left(asked, looks):
    prompts, config = asked.prompts["one"], {"keep_tokens": [100, 10], "prune_layer": [1, 3]}
    expected = stock(asked, prompts["images"])
    with strategy.prune(asked.model, VTRConfig(strategy="looks", **config)):
        asked.model.generate(**prompts, max_new_tokens=2, do_sample=False)
    first = EncoderView(expected.attention[:, :, :100], expected.keys[:, :, :100], expected.features[:, :100])
    same(looks[1].encoder, first)


def test_what_a_failed_call_left_is_not_taken_for_another_prompts(asked, looks):
    prompts = asked.prompts["one"]
    pixels = prompts["images"]
    with strategy.prune(asked.model, VTRConfig(strategy="looks", keep_tokens=64)):
        for _ in range(2):
            asked.model.encode_images(pixels.flip(-1))
        asked.model.generate(**prompts, max_new_tokens=2, do_sample=False)
        same(looks[-1].encoder, stock(asked, pixels))
        # By hand, several prompts may be encoded before they are prefilled.
        for _ in range(2):
            asked.model.encode_images(pixels.flip(-1))
        with torch.no_grad():
            asked.model(prompts["inputs"], images=pixels)
        same(looks[-1].encoder, stock(asked, pixels))


def test_prompts_whose_pictures_were_not_encoded_are_refused(asked, looks):
    prompts = asked.prompts["one"]
    embeddings, mask, layout = asked.model.embed_prompts(prompts["inputs"], None, prompts["images"])
    given = {"inputs_embeds": embeddings, "attention_mask": mask, "visual_layout": layout}
    with (
        torch.no_grad(),
        strategy.prune(asked.model, VTRConfig(strategy="looks", keep_tokens=64)),
        pytest.raises(ValueError, match=r"^looks looks at .* show 576 visual tokens, but the tower encoded 0: give"),
    ):
        asked.model(**given)


def test_threads_see_their_own_pictures(asked, looks):
    prompts, pixels = asked.prompts["one"], asked.prompts["several"]["images"]
    meeting, found = threading.Barrier(2, timeout=60), {}

    def answer(number):
        own = pixels[number : number + 1]
        embeddings = asked.model.embed_prompts(prompts["inputs"], None, own)
        meeting.wait()
        with torch.no_grad():
            names = ("inputs_embeds", "attention_mask", "visual_layout")
            asked.model(**dict(zip(names, embeddings, strict=True)))
        found[number] = True

    with strategy.prune(asked.model, VTRConfig(strategy="looks", keep_tokens=64)), ThreadPoolExecutor(2) as pool:
        list(pool.map(answer, range(2)))
    expected = stock(asked, pixels)
    sums = sorted(view.encoder.features.sum().item() for view in looks)
    assert sums == pytest.approx(sorted(expected.features[n].sum().item() for n in range(2)))


def test_only_the_asked_layer_is_hooked_and_afterwards_none(asked, looks):
    tower = asked.model.get_vision_tower().vision_tower
    hooked = lambda: [name for name, module in tower.named_modules() if module._forward_hooks]  # noqa: E731
    depth = len(tower.vision_model.encoder.layers)
    layer = f"vision_model.encoder.layers.{depth - 2}"
    with strategy.prune(asked.model, VTRConfig(strategy="looks", keep_tokens=64)):
        assert hooked() == [layer, f"{layer}.self_attn.k_proj", f"{layer}.self_attn.q_proj"]
    assert not hooked()


def test_a_layer_that_the_tower_does_not_have_is_named(asked, looks, monkeypatch):
    monkeypatch.setattr(strategy.registry.get("looks"), "encoder_layer", -99)
    with pytest.raises(ValueError, match=r"^looks looks at layer -99 of the vision tower, which has \d+ layers"):
        strategy.attach(asked.model, VTRConfig(strategy="looks"))
    assert not hasattr(asked.model, "_vtr_attachment")
