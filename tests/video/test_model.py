"""The package `videollava`: loading the original format, frames, and pruning a real clip."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import CLIPVisionConfig, CLIPVisionModel, LlamaModel

import clips
import make_clips
import strategy
import training
import world
from strategy import VTRConfig
from strategy.evaluation.digest import of_weights
from videollava.conversation import conv_templates
from videollava.mm_utils import load_video, prepare_image, prepare_prompt, prepare_video, tokenizer_image_token
from videollava.model.builder import load_pretrained_model, weight_folders

VIDEOS = Path(__file__).parents[2] / "examples/shapes/clips_test/videos"
CLIP = VIDEOS / "clip000.mp4"
QUESTION = "How many objects are there?"


@pytest.fixture(scope="module")
def loaded(checkpoint):
    return load_pretrained_model(str(checkpoint), device="cpu")


def prompt_ids(tokenizer, question):
    conversation = conv_templates["llava_v1"].copy()
    conversation.append_message(conversation.roles[0], question)
    conversation.append_message(conversation.roles[1], None)
    return tokenizer_image_token(conversation.get_prompt(), tokenizer, return_tensors="pt")[None]


def test_frames_are_evenly_spaced_and_the_same_each_time():
    frames = load_video(CLIP)
    assert frames.shape == (8, 3, 224, 224)
    assert frames.dtype == torch.uint8
    assert torch.equal(frames, load_video(CLIP))
    _, seed, _ = next(make_clips.samples())
    drawn, other = (clips.sample_clips(1, s).render(s)[0] * 255 for s in (seed, seed + 1))
    assert (drawn - frames).abs().mean() < 5 < (other - frames).abs().mean(), "the frames that models are trained on"


def test_an_animated_gif_is_a_video(tmp_path):
    colours = [(60 * number, 0, 0) for number in range(4)]
    first, *others = [Image.new("RGB", (64, 48), colour) for colour in colours]
    first.save(tmp_path / "x.gif", save_all=True, append_images=others, duration=100)
    frames = load_video(tmp_path / "x.gif", 4)
    assert frames.shape == (4, 3, 48, 64)
    assert frames[:, :, 0, 0].tolist() == [list(colour) for colour in colours]


def test_a_video_is_scaled_on_its_short_side_and_cut_in_the_middle():
    frames = torch.zeros(8, 3, 100, 300, dtype=torch.uint8)
    frames[:, :, :, 100:200] = 255
    pixels = prepare_video(frames)
    assert pixels.shape == (3, 8, 224, 224)
    white = (1 - 0.48145466) / 0.26862954
    assert pixels[0].median() == pytest.approx(white)
    assert prepare_image(Image.new("RGB", (640, 480), "white"))[0].mean() == pytest.approx(white)


@pytest.mark.parametrize("content", [b"", b"no video at all" * 100])
def test_a_video_that_cannot_be_decoded_is_named(tmp_path, content):
    (tmp_path / "broken.mp4").write_bytes(content)
    with pytest.raises(ValueError, match=r"broken\.mp4: cannot be decoded"):
        load_video(tmp_path / "broken.mp4")


def test_a_prompt_has_a_token_for_each_frame():
    assert prepare_prompt("what?") == "<image>" * 8 + "\nwhat?"
    assert prepare_prompt("in <video> what?") == "in " + "<image>" * 8 + " what?"
    # Marks whose number is not that of the videos are text.
    assert prepare_prompt("<video> or <video>?") == "<image>" * 8 + "\n< video> or < video>?"
    assert prepare_prompt("<image> in <video>?") == "< image> in " + "<image>" * 8 + "?"


def test_a_checkpoint_loads_with_both_towers_and_gives_the_students_answer(loaded, student):
    tokenizer, model, context = loaded
    assert context == 4096
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    drawn = clips.sample_clips(1, 5)
    frames = drawn.render(5)
    packed = training.pack(student, [[world.Question("count", QUESTION, "two")]], "cpu")
    pixels = ((frames - student.image_mean) / student.image_std)[0].transpose(0, 1)
    with torch.no_grad():
        kept = torch.arange(2056)[None]
        taught = student.answer(student.encode(frames), (16, 16), kept, packed)
        logits = model(prompt_ids(tokenizer, prepare_prompt(QUESTION)), images=[pixels]).logits
    first = int((packed.target[0] != training.IGNORED).nonzero()[0])
    # The checkpoint is in half precision.
    torch.testing.assert_close(taught[:, first], logits[:, -1], rtol=0, atol=0.05)
    assert taught[0, first].std() > 0.5


def test_the_spectral_term_is_in_force_on_a_real_clip(loaded):
    tokenizer, model, _ = loaded
    ids, video = prompt_ids(tokenizer, prepare_prompt(QUESTION)), prepare_video(load_video(CLIP))
    start = ids[0].tolist().index(-200)
    # An independent account of the score: features and attention of the stock model, energies by FFT.
    with torch.no_grad():
        embeddings, _, layout = model.embed_prompts(ids, None, [video])
        plain = LlamaModel._from_config(model.config, attn_implementation="eager").eval()
        plain.load_state_dict(model.model.state_dict(), strict=False)
        out = plain(inputs_embeds=embeddings, output_hidden_states=True, output_attentions=True)
    assert layout == [[strategy.Span(tuple(range(start, start + 2056, 257)), (8, 16, 16), lead=1)]]
    visual = slice(start, start + 2056)
    attention = out.attentions[2][0, :, -1, visual].mean(0)
    patches = torch.tensor([i for i in range(2056) if i % 257])

    def energy(hidden):
        x = hidden[0, visual][patches].view(8, 16, 16, -1)
        u = torch.arange(16) - 8
        gain = 1 - torch.exp(-(u[:, None] ** 2 + u**2) / (2 * 0.8**2))
        spectrum = torch.fft.fftshift(torch.fft.fft2(x, dim=(1, 2)), dim=(1, 2)) * gain[None, :, :, None]
        return torch.fft.ifft2(torch.fft.ifftshift(spectrum, dim=(1, 2)), dim=(1, 2)).abs().mean(-1).flatten()

    before, after = energy(out.hidden_states[2]), energy(out.hidden_states[3])
    change = ((after - before).abs() / (before.mean() + before + 1e-6)).clamp(max=1)
    factor = torch.sigmoid((change - change.mean()) / (change.std() + 1e-6) / 0.1)
    scores = attention.clone()
    scores[patches] *= factor
    with strategy.prune(model, VTRConfig(keep_tokens=194)) as run:
        model.generate(ids, images=[video], max_new_tokens=1)
    kept = set(run.stages[0].kept[0].tolist())
    expected, by_attention = (set(s.topk(194).indices.tolist()) for s in (scores, attention))
    assert (run.stages[0].layer, len(kept)) == (3, 194)
    assert len(kept ^ expected) <= 2, "but for rounding at the cut"
    assert len(kept ^ by_attention) > 20, "attention alone would keep others"


def test_the_defaults_resolve_from_the_strategy_alone(loaded):
    _, model, _ = loaded
    for config, kept in ((VTRConfig(strategy="clse"), 194), (VTRConfig(retain_ratio=0.1), 204)):
        with strategy.prune(model, config) as run:
            assert (run.plan.layers, run.plan.reference, run.plan.kept(2056)) == ((3,), 2, (kept,))


def test_a_picture_goes_through_its_own_tower(loaded):
    tokenizer, model, _ = loaded
    ids = prompt_ids(tokenizer, f"<image>\n{QUESTION}")
    picture = prepare_image(Image.new("RGB", (300, 200), "red"))
    with strategy.prune(model, VTRConfig(keep_tokens=100)) as run:
        model.generate(ids, images=[picture], max_new_tokens=1)
    assert (run.stages[0].before, run.stages[0].after) == (256, 100)


@pytest.mark.parametrize(
    ("images", "words"),
    [
        ([torch.zeros(3, 224, 224)], "8 image tokens, but 1 images"),
        ([torch.zeros(8, 3, 224, 224)], "want a video"),
    ],
)
def test_visuals_that_do_not_fit_the_prompt_are_refused(loaded, images, words):
    tokenizer, model, _ = loaded
    with pytest.raises(ValueError, match=words):
        model.generate(prompt_ids(tokenizer, prepare_prompt(QUESTION)), images=images, max_new_tokens=1)


def copy_of(checkpoint, folder):
    return Path(shutil.copytree(checkpoint, folder / "copy"))


def test_towers_may_lie_in_folders_of_their_own(loaded, checkpoint, tmp_path):
    folder = copy_of(checkpoint, tmp_path)
    weights = load_file(folder / "model.safetensors")
    inside = {name: tensor for name, tensor in weights.items() if "_tower." in name}
    save_file({n: t for n, t in weights.items() if n not in inside}, folder / "model.safetensors", {"format": "pt"})
    config = loaded[1].config.towers["video"]
    for kind in ("image", "video"):
        own = CLIPVisionModel(CLIPVisionConfig.from_dict(config.to_dict()))
        prefix = f"model.{kind}_tower.{kind}_tower."
        own.vision_model.load_state_dict({n.removeprefix(prefix): t for n, t in inside.items() if n.startswith(prefix)})
        own.save_pretrained(folder / f"{kind}_tower")
    _, model, _ = load_pretrained_model(str(folder), device="cpu")
    video = prepare_video(load_video(CLIP))
    ids = prompt_ids(loaded[0], prepare_prompt(QUESTION))
    with torch.no_grad():
        assert torch.equal(model(ids, images=[video]).logits, loaded[1](ids, images=[video]).logits)


def test_other_weights_under_the_same_name_are_told_apart(checkpoint, tmp_path):
    folder = copy_of(checkpoint, tmp_path)

    def digest() -> str:
        return of_weights(weight_folders(str(folder)))

    before = digest()
    assert before == of_weights(weight_folders(str(checkpoint)))
    weights = load_file(folder / "model.safetensors")
    last = max(weights)
    save_file(weights | {last: weights[last] + 1}, folder / "model.safetensors", {"format": "pt"})
    assert digest() != before


def spoil_temporal(folder):
    weights = load_file(folder / "model.safetensors")
    name = "model.video_tower.video_tower.encoder.layers.0.temporal_attn.q_proj.weight"
    save_file(weights | {name: torch.zeros(2, 2)}, folder / "model.safetensors", {"format": "pt"})


def spoil_missing(folder):
    weights = load_file(folder / "model.safetensors")
    del weights["model.video_tower.video_tower.encoder.layers.0.layer_norm1.bias"]
    save_file(weights, folder / "model.safetensors", {"format": "pt"})


def spoil_config(folder):
    config = json.loads((folder / "config.json").read_text())
    del config["mm_video_tower"]
    (folder / "config.json").write_text(json.dumps(config))


def spoil_weights(folder):
    data = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(data[: len(data) // 3])


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (spoil_temporal, "temporal attention, which is not supported"),
        (spoil_missing, "missing .*layer_norm1.bias"),
        (spoil_config, "config.json: mm_video_tower missing"),
        (spoil_weights, "model.safetensors: damaged"),
    ],
)
def test_a_broken_checkpoint_is_one_sentence(checkpoint, tmp_path, spoil, words):
    folder = copy_of(checkpoint, tmp_path)
    spoil(folder)
    with pytest.raises(ValueError, match=words):
        load_pretrained_model(str(folder), device="cpu")
