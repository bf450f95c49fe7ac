"""The package `llava`: loading the original format, prompts, generation."""

import json
import os
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from engine_checks import flop_counter, interrupt
from PIL import Image
from safetensors.torch import load_file, save_file
from torch.nn import functional as F
from torch.utils._python_dispatch import _len_torch_dispatch_stack
from transformers.cache_utils import DynamicCache

import strategy
from llava.constants import DEFAULT_IMAGE_TOKEN, IMAGE_TOKEN_INDEX
from llava.conversation import conv_templates
from llava.mm_utils import get_model_name_from_path, pad_left, prepare_pictures, process_images, tokenizer_image_token
from llava.model.builder import load_pretrained_model
from strategy import VTRConfig

CHECKPOINT = Path(__file__).parents[2] / "examples/shapes/checkpoints/shapes-llava"


@pytest.fixture(scope="module")
def loaded():
    return load_pretrained_model(str(CHECKPOINT), None, "shapes-llava", device="cpu")


@pytest.fixture(scope="module")
def pictures():
    from torchvision.transforms.functional import to_pil_image

    import world

    return [to_pil_image(picture) for picture in world.render(world.sample_scenes(3, 1), 1)]


def prompt_ids(tokenizer, question, images=1):
    conversation = conv_templates["vicuna_v1"].copy()
    conversation.append_message(conversation.roles[0], (DEFAULT_IMAGE_TOKEN + "\n") * images + question)
    conversation.append_message(conversation.roles[1], None)
    return tokenizer_image_token(conversation.get_prompt(), tokenizer, return_tensors="pt")


def test_a_checkpoint_loads_on_the_cpu_in_float32(loaded):
    tokenizer, model, processor, context = loaded
    assert model.device.type == "cpu"
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert (context, tokenizer.bos_token, processor.crop_size["height"]) == (2048, "<s>", 336)
    assert model.get_vision_tower().grid == (1, 24, 24)
    assert strategy.clse.default_prune_layers(model.config.num_hidden_layers) == (1, 4, 8)


def test_the_templates_are_those_of_vicuna():
    conversation = conv_templates["vicuna_v1"].copy()
    conversation.append_message(conversation.roles[0], "Hello?")
    conversation.append_message(conversation.roles[1], "Yes.")
    conversation.append_message(conversation.roles[0], "And?")
    conversation.append_message(conversation.roles[1], None)
    assert conversation.get_prompt().endswith("questions. USER: Hello? ASSISTANT: Yes.</s>USER: And? ASSISTANT:")
    assert conv_templates["vicuna_v1"].messages == []


def test_image_tokens_stand_where_the_prompt_has_them(loaded):
    tokenizer = loaded[0]
    ids = tokenizer_image_token("one <image>\ntwo <image> three", tokenizer)
    assert ids.count(IMAGE_TOKEN_INDEX) == 2
    assert ids.count(tokenizer.bos_token_id) == 1
    pieces = [tokenizer(text, add_special_tokens=False).input_ids for text in ("one ", "\ntwo ", " three")]
    assert ids[1:] == [*pieces[0], IMAGE_TOKEN_INDEX, *pieces[1], IMAGE_TOKEN_INDEX, *pieces[2]]
    with pytest.raises(ValueError, match="return_tensors='np'"):
        tokenizer_image_token("x", tokenizer, return_tensors="np")


@pytest.mark.parametrize(
    ("path", "name"), [("a/llava-v1.5-7b/", "llava-v1.5-7b"), ("a/b/checkpoint-10", "b_checkpoint-10")]
)
def test_a_models_name_comes_from_its_path(path, name):
    assert get_model_name_from_path(path) == name


def test_a_picture_is_padded_to_a_square_in_the_mean_colour(loaded):
    _, model, processor, _ = loaded
    wide = Image.new("RGBA", (200, 100), (255, 0, 0, 255))
    pixels = process_images([wide], processor, model.config)
    assert pixels.shape == (1, 3, 336, 336)
    assert pixels[0, :, 2].abs().max() < 0.02, "the mean colour is zero once normalised"
    cropped = process_images([wide], processor, SimpleNamespace(image_aspect_ratio="square"))
    assert cropped[0, 0].min() > 1


@pytest.mark.parametrize("aspect", ["pad", "square"])
@pytest.mark.parametrize("size", [(1, 1), (3, 3), (1, 3), (3, 1), (300, 3), (5, 1)])
def test_a_picture_of_few_rows_keeps_its_colours(loaded, size, aspect):
    config, processor = SimpleNamespace(image_aspect_ratio=aspect), loaded[2]
    small, large = (process_images([Image.new("RGB", each, "red")], processor, config) for each in (size, (40, 40)))
    assert small.shape == large.shape
    middle = small.shape[-1] // 2
    assert torch.equal(small[0, :, middle, middle], large[0, :, 0, 0])


def test_pictures_as_bytes_are_seen_as_their_pixel_values(loaded, pictures):
    _, model, processor, _ = loaded
    mixed = [Image.new("RGB", (2000, 900), "blue"), *pictures]
    prepared = prepare_pictures(mixed, processor, model.config, torch.device("cuda"))
    assert {each.dtype for each in prepared} == {torch.float32, torch.uint8}
    assert torch.equal(
        model.encode_images(prepared), model.encode_images(process_images(mixed, processor, model.config))
    )


def test_a_batch_answers_as_each_prompt_alone(loaded, pictures):
    tokenizer, model, processor, _ = loaded
    pixels = process_images(pictures, processor, model.config)
    questions = ["How many objects are there?", "Is there a red circle?", "What shape is the blue object?"]
    ids = [prompt_ids(tokenizer, question) for question in questions]
    ids.append(prompt_ids(tokenizer, "Is there a star?", images=0))
    padded = torch.nn.utils.rnn.pad_sequence([i.flip(0) for i in ids], batch_first=True).flip(1)
    mask = torch.stack([torch.arange(padded.shape[1]).flip(0) < len(i) for i in ids])
    with strategy.prune(model, VTRConfig(keep_tokens=64)) as run:
        together = model.generate(padded, images=pixels, attention_mask=mask, max_new_tokens=4, min_new_tokens=4)
        kept = run.stages[-1].kept
        for number, single in enumerate(ids):
            own = pixels[number : number + 1] if number < 3 else None
            alone = model.generate(single[None], images=own, max_new_tokens=4, min_new_tokens=4)
            assert alone.tolist() == together[number : number + 1].tolist()
            if number < 3:
                assert torch.equal(run.stages[-1].kept[0], kept[number])
    assert [len(tensor) for tensor in kept] == [20, 20, 20, 0]


def test_generation_of_every_kind_starts_from_the_same_pruned_prompt(loaded, pictures):
    tokenizer, model, processor, _ = loaded
    pixels = process_images(pictures[:1], processor, model.config)
    ids = prompt_ids(tokenizer, "How many objects are there?")[None]
    call = {"input_ids": ids, "images": [pixels[0]], "image_sizes": [(336, 336)], "max_new_tokens": 3}
    with strategy.prune(model, VTRConfig(keep_tokens=192)) as run:
        greedy = model.generate(**call)
        assert [stage.after for stage in run.stages] == [330, 210, 62]
        assert greedy.shape[1] <= 3, "new tokens only"
        beams = model.generate(**call, num_beams=3, num_return_sequences=2)
        assert len(beams) == 2
        assert [stage.after for stage in run.stages] == [3 * 330, 3 * 210, 3 * 62]
        torch.manual_seed(0)
        sampled = model.generate(**call, do_sample=True, temperature=0.01)
        assert sampled.tolist() == greedy.tolist()
        assert model.generate(**call, use_cache=False).shape[0] == 1
    assert model.generate(**call).shape[0] == 1


@pytest.mark.parametrize("name", strategy.available())
def test_generation_is_a_loop_by_hand_for_every_strategy(loaded, pictures, name):
    tokenizer, model, processor, _ = loaded
    questions = ("How many objects are there?", "Is there a red circle in the picture?")
    ids, mask = pad_left([prompt_ids(tokenizer, question) for question in questions])
    pixels = process_images(pictures[:2], processor, model.config)
    with torch.no_grad(), strategy.prune(model, VTRConfig(strategy=name, keep_tokens=9)) as run:
        said = model.generate(ids, images=pixels, attention_mask=mask, max_new_tokens=4, min_new_tokens=4)
        embeddings, mask, layout = model.embed_prompts(ids, mask, pixels)
        given = {"inputs_embeds": embeddings, "attention_mask": mask, "visual_layout": layout}
        cache, steps = DynamicCache(), []
        for _ in range(4):
            output = model(**given, past_key_values=cache, use_cache=True)
            output.logits[..., tokenizer.eos_token_id] = -torch.inf  # as min_new_tokens has it
            steps.append(output.logits[:, -1:].argmax(-1))
            mask = torch.cat([mask, mask.new_ones(len(mask), 1)], dim=1)
            given = {"input_ids": steps[-1], "attention_mask": mask}
    assert torch.equal(said, torch.cat(steps, dim=1))
    assert run.samples == 4


@torch.no_grad()
def test_all_that_an_answer_costs_is_counted_as_torch_counts_it(loaded, pictures):
    tokenizer, model, processor, _ = loaded
    pixels = process_images(pictures[:1], processor, model.config)
    ids = prompt_ids(tokenizer, "How many objects are there?")[None]
    with strategy.prune(model, VTRConfig(keep_tokens=64)) as run:
        for _ in range(2):  # the second time some of it is remembered
            with flop_counter() as counter:
                model.generate(ids, images=pixels, max_new_tokens=3, min_new_tokens=3)
    assert 2 * counter.get_total_flops() / 2 == pytest.approx(sum(run.multiply_adds.values()), rel=0.01)
    assert all(run.multiply_adds[part] > 0 for part in ("vision", "prefill", "scoring", "head", "decode"))
    assert run.decoded == 4


def test_an_interrupt_in_the_tower_ends_its_counting(loaded, pictures):
    _, model, processor, _ = loaded
    pixels = process_images(pictures[:1], processor, model.config)
    modes = _len_torch_dispatch_stack()
    with strategy.prune(model, VTRConfig()) as run:
        layer = model.get_vision_tower().vision_tower.vision_model.encoder.layers[1]
        broken = layer.register_forward_pre_hook(interrupt)
        for _ in range(2):
            with pytest.raises(KeyboardInterrupt):
                model.encode_images(pixels)
        broken.remove()
        assert run.multiply_adds["vision"] == 0
        model.encode_images(pixels)
        whole = run.multiply_adds["vision"]
        model.encode_images(pixels)
        assert run.multiply_adds["vision"] == 2 * whole > 0
        broken = layer.register_forward_pre_hook(interrupt)
        with pytest.raises(KeyboardInterrupt):
            model.encode_images(process_images(pictures[:2], processor, model.config))
        broken.remove()
    assert _len_torch_dispatch_stack() == modes


@torch.no_grad()
@pytest.mark.parametrize("padding", [0, 7])
def test_the_second_prefill_of_priortr_is_one_without_the_question(loaded, pictures, padding):
    tokenizer, model, processor, _ = loaded
    pixels = process_images(pictures[:1], processor, model.config)
    ids = prompt_ids(tokenizer, "How many objects are there?")
    place = int((ids == IMAGE_TOKEN_INDEX).nonzero())
    assert tokenizer.convert_ids_to_tokens(ids[-2:].tolist()) == ["▁ASSISTANT", ":"]
    short = torch.cat([ids[: place + 2], ids[-2:]])
    attention = []
    for prompt in (ids, short):
        embeddings, mask, _ = model.embed_prompts(prompt[None], None, pixels)
        output = model.get_decoder()(inputs_embeds=embeddings, attention_mask=mask, output_attentions=True)
        attention.append(output.attentions[3][0, :, :, place : place + 576].mean(0))
    posterior, prior = attention[0][place + 576 :].mean(0), attention[1][-1]
    p, q = posterior / posterior.sum(), prior / prior.sum()
    expected = (p * (p / q).log()).topk(64).indices.sort().values
    config = VTRConfig(strategy="priortr_2f", keep_tokens=64, prune_layer=4)
    padded = torch.cat([ids.new_zeros(padding), ids])
    mask = torch.arange(len(padded)) >= padding
    with strategy.prune(model, config) as run:
        model.generate(padded[None], images=pixels, attention_mask=mask[None], max_new_tokens=2)
    assert torch.equal(run.stages[0].kept[0], expected)
    assert not torch.equal(attention[0][place + 576], prior)


def test_prompts_and_pictures_must_match(loaded, pictures):
    tokenizer, model, processor, _ = loaded
    ids = prompt_ids(tokenizer, "What?")[None]
    pixels = process_images(pictures[:2], processor, model.config)
    for images, count in ((pixels, 2), (None, 0)):
        with pytest.raises(ValueError, match=f"1 image tokens, but {count} images"):
            model.generate(ids, images=images)
    with pytest.raises(ValueError, match="input_ids"):
        model.generate(images=pixels)
    with pytest.raises(ValueError, match="1 image tokens, but 0 images"):
        model(ids)


@pytest.fixture
def checkpoint(tmp_path):
    folder = tmp_path / "checkpoint"
    shutil.copytree(CHECKPOINT, folder)
    return folder


def edit_config(folder, **values):
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


def shard(folder, write, suffix):
    """Split the weights over two files with an index, as large checkpoints are."""
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    weights["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(16)
    names, index = sorted(weights), {}
    for number, part in enumerate((names[::2], names[1::2])):
        file = f"pytorch_model-{number}.{suffix}"
        write({name: weights[name].contiguous() for name in part}, folder / file)
        index |= dict.fromkeys(part, file)
    stem = "pytorch_model.bin" if suffix == "bin" else "model.safetensors"
    (folder / f"{stem}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))


def write_safetensors(weights, file):
    save_file(weights, file, metadata={"format": "pt"})


@pytest.mark.parametrize(("write", "suffix"), [(torch.save, "bin"), (write_safetensors, "safetensors")])
def test_sharded_weights_of_either_kind_load(loaded, checkpoint, write, suffix):
    shard(checkpoint, write, suffix)
    model = load_pretrained_model(str(checkpoint), device="cpu")[1]
    ours, theirs = model.state_dict(), loaded[1].state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_a_linear_projector_loads(checkpoint):
    weights = load_file(checkpoint / "model.safetensors")
    weights = {name: tensor for name, tensor in weights.items() if "mm_projector.2" not in name}
    save_file(weights, checkpoint / "model.safetensors", metadata={"format": "pt"})
    edit_config(checkpoint, mm_projector_type="linear")
    assert len(load_pretrained_model(str(checkpoint), device="cpu")[1].model.mm_projector) == 1


def damage_config(text):
    return lambda folder: (folder / "config.json").write_text(text)


def cut(name):
    def damage(folder):
        file = folder / name
        file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])

    return damage


def cut_bin(folder):
    shard(folder, torch.save, "bin")
    cut("pytorch_model-1.bin")(folder)


def lose_shard(folder):
    shard(folder, torch.save, "bin")
    (folder / "pytorch_model-0.bin").unlink()


def lose_from(folder):
    weights = load_file(folder / "model.safetensors")
    del weights["vision_model.encoder.layers.1.mlp.fc1.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def lose_and_add(folder):
    weights = load_file(folder / "model.safetensors")
    weights["model.extra"] = weights.pop("model.layers.3.mlp.up_proj.weight")
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (shutil.rmtree, ["is not a folder", "hub"]),
        (lambda f: (f / "config.json").unlink(), ["config.json", "missing"]),
        (damage_config("{"), ["config.json", "not JSON"]),
        (damage_config("[1]"), ["config.json", "not JSON"]),
        (cut("tokenizer_config.json"), ["tokenizer_config.json", "not JSON"]),
        (cut("tokenizer.model"), ["tokenizer.model", "sentencepiece"]),
        (cut("vision_tower/config.json"), ["vision_tower/config.json", "not JSON"]),
        (lambda f: edit_config(f, mm_hidden_size=None), ["config.json", "mm_hidden_size missing"]),
        (lambda f: edit_config(f, vocab_size=10**12), ["embed_tokens.weight is", "not (1000000000000, 192)"]),
        (lambda f: edit_config(f, num_hidden_layers=10**9), ["num_hidden_layers=1000000000", "weights"]),
        (lambda f: edit_config(f, max_position_embeddings=10**12), ["max_position_embeddings=1000000000000"]),
        (lambda f: edit_config(f, num_attention_heads=0), ["no model of such a configuration"]),
        (lambda f: edit_config(f / "vision_tower", hidden_size=3 * 2**40), ["vision_tower", "no model of such"]),
        (lambda f: edit_config(f, mm_vision_select_layer=-40), ["mm_vision_select_layer=-40", "5 layers"]),
        (lambda f: edit_config(f, mm_vision_select_feature="cls_patch"), ["cls_patch", "'patch'"]),
        (lambda f: (f / "adapter_config.json").write_text("{}"), ["LoRA"]),
        (lambda f: lose_from(f / "vision_tower"), ["vision_tower", "missing ['vision_model"]),
        (lambda f: edit_config(f, text_config={}), ["config.json", "transformers' own LLaVA"]),
        (lambda f: edit_config(f, model_type="gpt2"), ["model_type='gpt2'", "'llava'"]),
        (lambda f: edit_config(f, image_aspect_ratio="anyres"), ["LLaVA-1.6"]),
        (lambda f: edit_config(f, mm_projector_type="resampler"), ["mm_projector_type='resampler'", "mlp2x_gelu"]),
        (lambda f: edit_config(f, mm_vision_tower="nowhere/at-all"), ["nowhere/at-all"]),
        (lambda f: edit_config(f, mm_use_im_start_end=True), ["mm_use_im_start_end"]),
        (lambda f: (f / "model.safetensors").unlink(), ["no weights"]),
        (cut("model.safetensors"), ["model.safetensors", "cut off"]),
        (cut("vision_tower/model.safetensors"), ["vision_tower/model.safetensors", "cut off"]),
        (cut_bin, ["pytorch_model-1.bin", "cut off"]),
        (lose_shard, ["pytorch_model-0.bin", "missing"]),
        (lose_and_add, ["missing ['model.layers.3.mlp.up_proj.weight']", "left over ['model.extra']"]),
        (lambda f: edit_config(f, hidden_size=96), ["weights do not fit", "not (576, 96)"]),
        (lambda f: (f / "tokenizer.model").unlink(), ["tokenizer"]),
        (lambda f: (f / "vision_tower/preprocessor_config.json").unlink(), ["preprocessor_config.json"]),
    ],
)
def test_a_damaged_checkpoint_is_one_sentence_that_names_the_file(checkpoint, damage, words, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    damage(checkpoint)
    with pytest.raises(ValueError, match=words[0].replace("[", r"\[")) as error:
        load_pretrained_model(str(checkpoint), device="cpu")
    assert all(word in str(error.value) for word in words), error.value


class Trap:
    """A pickle that leaves a trace if it is run."""

    def __init__(self, trace):
        self.trace = trace

    def __reduce__(self):
        return os.mkdir, (str(self.trace),)


def test_code_in_a_pickle_is_never_run(checkpoint, tmp_path):
    (checkpoint / "model.safetensors").unlink()
    torch.save({"model.norm.weight": Trap(tmp_path / "trace")}, checkpoint / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"pytorch_model.bin: .*more than tensors"):
        load_pretrained_model(str(checkpoint), device="cpu")
    assert not (tmp_path / "trace").exists()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"model_base": "some/base"}, "merge"),
        ({"load_4bit": True}, "quantised"),
        ({"device": "toaster"}, "device='toaster': allowed are cpu"),
        ({"attn_implementation": "magic"}, "attn_implementation='magic': allowed are sdpa, eager"),
    ],
)
def test_what_cannot_be_had_is_refused(arguments, words):
    with pytest.raises(ValueError, match=words):
        load_pretrained_model(str(CHECKPOINT), **arguments)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_prunes_too(dtype, pictures):
    tokenizer, model, processor, _ = load_pretrained_model(str(CHECKPOINT), device="cpu", dtype=dtype)
    pixels = process_images(pictures[:1], processor, model.config)
    ids = prompt_ids(tokenizer, "How many objects are there?")[None]
    with strategy.prune(model, VTRConfig(keep_tokens=192)) as run:
        output = model(ids, images=pixels)
        answer = model.generate(ids, images=pixels, max_new_tokens=3)
    assert torch.isfinite(output.logits).all()
    assert [stage.after for stage in run.stages] == [330, 210, 62]
    assert 1 <= answer.shape[1] <= 3


def test_a_follow_up_on_the_cache_needs_no_positions(loaded, pictures):
    tokenizer, model, processor, _ = loaded
    pixels = process_images(pictures[:1], processor, model.config)
    ids = prompt_ids(tokenizer, "How many objects are there?")[None]
    with torch.no_grad(), strategy.prune(model, VTRConfig(keep_tokens=64)):
        first = model(ids, images=pixels, use_cache=True)
        token = first.logits[:, -1:].argmax(-1)
        bare = model(token, past_key_values=first.past_key_values)
        again = model(ids, images=pixels, use_cache=True)
        mask = torch.ones(1, ids.shape[1] - 1 + 576 + 1)
        masked = model(token, past_key_values=again.past_key_values, attention_mask=mask)
    assert torch.equal(bare.logits, masked.logits)


def two_turns(model, prompts, asked, pixels):
    """The tokens of an answer and of what is then said to a second question, batched, with padding before each."""

    def padded(rows):
        longest = max(map(len, rows))
        ids = torch.stack([F.pad(row, (longest - len(row), 0)) for row in rows])
        return ids, torch.stack([F.pad(torch.ones_like(row), (longest - len(row), 0)) for row in rows])

    (ids, mask), (later, later_mask), cache = padded(prompts), padded(asked), DynamicCache()
    options = {"images": pixels, "past_key_values": cache, "pad_token_id": 0}
    answer = model.generate(ids, attention_mask=mask, max_new_tokens=3, min_new_tokens=3, **options)
    ids = torch.cat([ids, answer, later], dim=1)
    mask = torch.cat([mask, torch.ones_like(answer), later_mask], dim=1)
    return answer, model.generate(ids, attention_mask=mask, max_new_tokens=4, min_new_tokens=4, **options)


@torch.no_grad()
def test_a_second_question_goes_on_from_the_pruned_cache(loaded, pictures):
    tokenizer, model, processor, _ = loaded
    pixels = process_images(pictures[:2], processor, model.config)
    prompts = [prompt_ids(tokenizer, text) for text in ("How many objects are there?", "Is there a red star?")]
    asked = [tokenizer_image_token(f"USER: {text} ASSISTANT:", tokenizer, return_tensors="pt")[1:] for text in "xy z"]
    asked = [asked[0], torch.cat([asked[1], asked[2]])]
    with strategy.prune(model, VTRConfig(keep_tokens=64)) as run:
        together = two_turns(model, prompts, asked, pixels)
        for number in range(2):
            mine = slice(number, number + 1)
            alone = two_turns(model, prompts[mine], asked[mine], pixels[mine])
            assert torch.equal(alone[0], together[0][mine])
            assert torch.equal(alone[1], together[1][mine])
        assert run.samples == 4
        # By hand, what the cache of the last one does not hold yet: the answer's last token, then the question.
        cache, token, expected = DynamicCache(), None, []
        options = {"images": pixels[1:], "max_new_tokens": 3, "min_new_tokens": 3}
        answer = model.generate(prompts[1][None], past_key_values=cache, **options)
        token = torch.cat([answer[0, -1:], asked[1]])[None]
        for _ in range(4):
            logits = model(token, past_key_values=cache).logits[:, -1:]
            logits[..., tokenizer.eos_token_id] = -torch.inf  # as min_new_tokens has it
            token = logits.argmax(-1)
            expected.append(token)
    assert torch.equal(alone[1], torch.cat(expected, dim=1))
