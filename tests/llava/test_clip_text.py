"""The text tower of CLIP: what CDPruner is given of it on LLaVA, beside transformers' own CLIP."""

import json
from typing import ClassVar

import pytest
import torch
from engine_checks import flop_counter
from test_fast import small
from transformers import CLIPConfig, CLIPModel, CLIPTextConfig, CLIPTokenizerFast
from transformers.models.gpt2.tokenization_gpt2 import bytes_to_unicode

import strategy
from llava.model.clip_text import load_joint_space
from llava.model.prompts import question_ids
from strategy import VTRConfig, registry

LONGEST = 12  # tokens of the text tower


@pytest.fixture(scope="module")
def asked():
    return small("cpu")


@pytest.fixture(scope="module")
def clip(asked, tmp_path_factory):
    """A CLIP model with the vision tower of the model, and a text tower of random weights; its folder."""
    folder = tmp_path_factory.mktemp("clip")
    letters = list(bytes_to_unicode().values())
    words = [*letters, *(letter + "</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    (folder / "vocab.json").write_text(json.dumps({word: number for number, word in enumerate(words)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    CLIPTokenizerFast(str(folder / "vocab.json"), str(folder / "merges.txt")).save_pretrained(folder)
    text = CLIPTextConfig(
        vocab_size=len(words),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=LONGEST,
        bos_token_id=len(words) - 2,
        eos_token_id=len(words) - 1,
    )
    tower = asked.model.get_vision_tower().vision_tower
    torch.manual_seed(0)
    model = CLIPModel(CLIPConfig.from_text_vision_configs(text, tower.config, projection_dim=24)).eval()
    model.vision_model.load_state_dict(tower.vision_model.state_dict())
    model.save_pretrained(folder)
    return folder


@torch.no_grad()
def test_the_space_is_that_of_clip(asked, clip):
    space, model = load_joint_space(str(clip), asked.model.get_vision_tower()), CLIPModel.from_pretrained(clip).eval()
    tokenizer = CLIPTokenizerFast.from_pretrained(clip)
    texts = ["red dot?", "", "how many"]
    ids, lengths, owners = space.tokenize(texts)
    given = tokenizer(texts, padding=True, return_tensors="pt")
    expected = torch.nn.functional.normalize(model.get_text_features(**given), dim=-1)
    assert owners.tolist() == [0, 1, 2]
    torch.testing.assert_close(space.embed(ids, lengths), expected)
    pixels = torch.randn(1, 3, *[model.config.vision_config.image_size] * 2)
    seen = model.vision_model(pixels, output_hidden_states=True)
    torch.testing.assert_close(space.align(seen.hidden_states[-1][:, :1])[:, 0], model.get_image_features(pixels))


@torch.no_grad()
def test_a_long_text_is_several_pieces_each_with_both_ends(asked, clip):
    space = load_joint_space(str(clip), asked.model.get_vision_tower())
    ids, lengths, owners = space.tokenize(["ab", "abcdefghijklmnopqrstuvwxyz"])
    assert lengths.tolist() == [4, LONGEST, LONGEST, 8]
    assert owners.tolist() == [0, 1, 1, 1]
    alone, _, _ = space.tokenize(["ab"])
    assert ids[0, :4].tolist() == alone[0].tolist()
    pieces = space.embed(ids, lengths)
    torch.testing.assert_close(pieces.norm(dim=1), torch.ones(4))
    torch.testing.assert_close(space.embed(alone, lengths[:1])[0], pieces[0])


def test_the_question_stands_behind_the_last_picture():
    ids = torch.tensor([[0, 0, 1, -200, 5, 6], [1, -200, 3, -200, 7, 8], [0, 1, 2, 3, 4, 5]])
    mask = torch.tensor([[0, 0, 1, 1, 1, 1], [1] * 6, [0, 1, 1, 1, 1, 1]])
    assert question_ids(ids, mask) == [[5, 6], [7, 8], [1, 2, 3, 4, 5]]
    assert question_ids(ids[:1, 3:], None) == [[5, 6]]


class Listening(registry.get("cdpruner")):
    views: ClassVar[list] = []

    def select(self, view):
        self.views.append(view)
        return super().select(view)


@pytest.fixture
def views(monkeypatch):
    monkeypatch.setattr(Listening, "views", [])
    monkeypatch.setitem(registry._strategies, "cdpruner", Listening)
    return Listening.views


@torch.no_grad()
@pytest.mark.parametrize("engine", ["eager", "graph"])
def test_each_sample_is_given_its_question_and_its_pictures(asked, clip, views, engine):
    prompts, model = asked.prompts["mixed"], CLIPModel.from_pretrained(clip).eval()
    tokenizer = CLIPTokenizerFast.from_pretrained(clip)
    tower = asked.model.get_vision_tower().vision_tower
    features = tower(prompts["images"], output_hidden_states=True).hidden_states[-2][:, 1:]
    placed = model.visual_projection(tower.vision_model.post_layernorm(features))
    pictures = {0: placed[:1].flatten(0, 1), 2: placed[1:].flatten(0, 1)}
    config = VTRConfig(strategy="cdpruner", keep_tokens=64, clip_text=str(clip), engine=engine)
    with strategy.prune(asked.model, config) as record:
        for _ in range(2):
            views.clear()
            asked.model.generate(**prompts, max_new_tokens=2, do_sample=False)
            assert sorted(sample for view in views for sample in view.samples) == [0, 2]
    behind = question_ids(prompts["inputs"], prompts["attention_mask"])
    template = asked.model.num_template_tokens
    for view in views:
        for row, sample in enumerate(view.samples):
            torch.testing.assert_close(view.joint.visual[row], pictures[sample], rtol=0, atol=1e-5)
            ids = behind[sample]
            text = asked.model.tokenizer.decode(ids[: len(ids) - template], skip_special_tokens=True).strip()
            words = tokenizer(text, add_special_tokens=False).input_ids[: LONGEST - 2]
            assert words, "the question has a text"
            if len(tokenizer(text).input_ids) <= LONGEST:
                expected = model.get_text_features(**tokenizer(text, return_tensors="pt"))[0]
                torch.testing.assert_close(view.joint.question[row], expected / expected.norm(), rtol=0, atol=1e-5)
    assert record.means()["multiply_adds"]["scoring"] > 0
    assert record.means()["seconds"]["scoring"] > 0


def test_a_batch_and_beams_keep_what_single_questions_keep(asked, clip):
    prompts, config = asked.prompts["several"], {"keep_tokens": 64, "clip_text": str(clip), "engine": "eager"}

    def kept(given, **more):
        found = {}
        watch = lambda view, scores, chosen: found.update(zip(view.samples, chosen.tolist(), strict=True))  # noqa: E731
        with strategy.prune(asked.model, VTRConfig(strategy="cdpruner", **config), watch=watch):
            asked.model.generate(**given, max_new_tokens=1, do_sample=False, **more)
        return [found[sample] for sample in sorted(found)]

    count = len(prompts["inputs"])
    one = lambda at: {n: v[at : at + 1] if isinstance(v, torch.Tensor) else v for n, v in prompts.items()}  # noqa: E731
    singles = [own for at in range(count) for own in kept(one(at))]
    assert len({tuple(own) for own in singles}) == count
    assert kept(prompts) == singles
    assert kept(prompts, num_beams=2) == [own for own in singles for _ in range(2)]


def test_what_the_text_tower_costs_is_counted_as_torch_counts_it(asked, clip):
    scoring = {}
    for name in (None, str(clip)):
        config = VTRConfig(strategy="cdpruner", keep_tokens=64, clip_text=name, engine="eager")
        with strategy.prune(asked.model, config) as run, flop_counter() as counter:
            asked.model.generate(**asked.prompts["one"], max_new_tokens=2, do_sample=False)
        assert sum(run.multiply_adds.values()) == pytest.approx(counter.get_total_flops() / 2, rel=0.01)
        scoring[name] = run.multiply_adds["scoring"]
    assert scoring[str(clip)] > scoring[None]


def test_what_cannot_be_is_refused_by_name(asked, clip, tmp_path):
    refuse = lambda reason: pytest.raises(ValueError, match=reason)  # noqa: E731
    attach = lambda model, source: strategy.attach(  # noqa: E731
        model, VTRConfig(strategy="cdpruner", keep_tokens=64, clip_text=str(source))
    )
    with refuse(r"^clip_text='.*nowhere' cannot be loaded: "):
        attach(asked.model, tmp_path / "nowhere")
    tower = asked.model.get_vision_tower().vision_tower
    tower.save_pretrained(tmp_path / "tower")
    with refuse(r"tower' (is no CLIP model with a text tower: .* is missing|cannot be loaded)"):
        attach(asked.model, tmp_path / "tower")
    small = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    text, vision = small | {"vocab_size": 600}, small | {"image_size": 28, "patch_size": 14}
    wide = CLIPConfig(text_config=text, vision_config=vision)
    CLIPModel(wide).save_pretrained(tmp_path / "other")
    CLIPTokenizerFast.from_pretrained(clip).save_pretrained(tmp_path / "other")
    with refuse(r"other' has a vision tower of width 32, but that of the model has width \d+: give the CLIP model"):
        attach(asked.model, tmp_path / "other")
    prompts, config = asked.prompts["one"], VTRConfig(strategy="cdpruner", keep_tokens=64, clip_text=str(clip))
    with torch.no_grad(), strategy.prune(asked.model, config):
        parts = asked.model.embed_prompts(prompts["inputs"], None, prompts["images"])
        given = dict(zip(("inputs_embeds", "attention_mask", "visual_layout"), parts, strict=True))
        with refuse(
            r"^cdpruner compares pictures with the text of the question \(clip_text\), which is not known: give"
        ):
            asked.model(**given)
