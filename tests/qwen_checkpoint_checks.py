"""What both Qwen wrappers for lmms-eval owe whoever brings a checkpoint and arguments: the right weights or a sentence.

The tests of a backbone import everything from here and give a fixture `wrapper`, a `lmms_checks.Wrapper`.
"""

import inspect
import json
import re
import shutil
import time

import pytest
import torch
from checkpoint_checks import *  # noqa: F403
from checkpoint_checks import KINDS, edit, refusal, same, spoil_text, weights_of, write
from lmms_checks import CHECKPOINTS
from lmms_eval.models import get_model

from qwen_vl_vtr.arguments import choose_devices


@pytest.fixture(scope="session")
def checkpoint(wrapper):
    return wrapper.checkpoint


def model_in(wrapper, folder, **arguments):
    return get_model(wrapper.name)(pretrained=str(folder), device="cpu", enabled=False, **arguments)


def tensors(lm):
    return {name: tensor.clone() for name, tensor in lm.model.state_dict().items()}


@pytest.fixture(scope="session")
def load(wrapper):
    return lambda folder: tensors(model_in(wrapper, folder))


@pytest.mark.parametrize(
    "part", [r"blocks\.3\.attn\.qkv\.bias", r"patch_embed\.proj\.weight", r"blocks\.4\.", "visual"]
)
def test_what_is_missing_of_the_vision_tower_is_named(load, copy, part):
    weights = weights_of(copy)
    write(copy, {name: tensor for name, tensor in weights.items() if not re.search(part, name)}, "bin")
    said = refusal(load, copy)
    assert f"{copy}: the weights do not fit config.json: missing ['model.visual." in said
    assert all(re.search(part, name) for name in re.findall(r"'([^']*)'", said))


def test_several_faults_are_one_sentence(load, copy):
    edit(copy, "text_config", intermediate_size=96, num_hidden_layers=11, layer_types=["full_attention"] * 11)
    said = refusal(load, copy)
    assert re.search(r"left over \['model.language_model.layers.11.*'\] and \d+ more, ", said)
    assert re.search(r"is \(128, 160\), not \(128, 96\), .* 28 more of another shape$", said)


def test_a_head_that_is_tied_to_the_embeddings_is_no_fault(load, copy):
    weights = {name: tensor for name, tensor in weights_of(copy).items() if name != "lm_head.weight"}
    edit(copy, tie_word_embeddings=True)
    edit(copy, "text_config", tie_word_embeddings=True)
    write(copy, weights, "safetensors")
    mine = load(copy)
    assert torch.equal(mine["lm_head.weight"], mine["model.language_model.embed_tokens.weight"])
    write(copy, {name: tensor for name, tensor in weights.items() if "embed_tokens" not in name}, "safetensors")
    assert "lm_head.weight" in refusal(load, copy)


@pytest.mark.parametrize("name", ["model.rotary_emb.inv_freq", "model.layers.0.self_attn.rotary_emb.inv_freq"])
def test_tables_that_models_compute_themselves_are_no_fault(load, copy, loaded, name):
    write(copy, weights_of(copy) | {name: torch.zeros(16)}, "safetensors")
    assert same(load(copy), loaded)


KINDS_OF_MODEL = [
    "qwen2_vl",
    "qwen2_5_vl",
    "qwen3_vl",
    "qwen3_vl_moe",
    "qwen3_5",
    "llava",
    "gpt2",
    "",
    None,
    ["qwen2_vl"],
]


@pytest.mark.parametrize("kind", KINDS_OF_MODEL, ids=str)
def test_another_family_is_refused_for_what_it_is(wrapper, load, copy, kind):
    own = json.loads((copy / "config.json").read_text())["model_type"]
    if kind == own or (kind == "qwen3_vl_moe" and own == "qwen3_vl"):
        return
    edit(copy, model_type=kind)
    said = refusal(load, copy)
    assert said.startswith(f"{wrapper.name}: {copy}: model_type={kind!r} in config.json: want '{own}'")


def test_the_checkpoints_of_the_other_backbones_are_refused(wrapper, load):
    for other in set(CHECKPOINTS.iterdir()) - {wrapper.checkpoint}:
        said = refusal(load, other)
        kind = json.loads((other / "config.json").read_text())["model_type"]
        assert f"{other}: model_type={kind!r} in config.json: want " in said


SPOILED = {
    "a broken processor": (
        spoil_text("preprocessor_config.json", "{"),
        "preprocessor_config.json: missing, or not JSON",
    ),
    "quantised": (
        lambda f: edit(f, quantization_config={"quant_method": "awq"}),
        "copy: quantization_config in config",
    ),
    "weights elsewhere": (
        lambda f: edit(f, transformers_weights="x.safetensors"),
        "transformers_weights in config.json",
    ),
    "layers of no number": (lambda f: edit(f, "text_config", num_hidden_layers="12"), "num_hidden_layers='12', but"),
    "no layers": (lambda f: edit(f, "text_config", num_hidden_layers=0), "num_hidden_layers=0, but there are"),
    "no text": (lambda f: edit(f, text_config=[]), "copy: "),
    "no heads": (lambda f: edit(f, "text_config", num_attention_heads=0), "copy: there is no model of such"),
    "a width of text": (lambda f: edit(f, "text_config", hidden_size="x"), "copy: there is no model of such"),
    "a vocabulary too large to count": (
        lambda f: edit(f, "text_config", vocab_size=10**18),
        "copy: there is no model of such a configuration",
    ),
}


@pytest.mark.parametrize(("spoil", "words"), SPOILED.values(), ids=SPOILED)
def test_a_checkpoint_that_cannot_be_right_is_one_sentence(load, copy, spoil, words):
    spoil(copy)
    assert re.search(words, refusal(load, copy))


@pytest.mark.parametrize("kind", KINDS)
def test_a_huge_configuration_is_refused_at_once_and_without_memory(load, copy, kind):
    weights = {name: tensor for name, tensor in weights_of(copy).items() if "lm_head" not in name}
    write(copy, weights, kind)
    edit(copy, "text_config", vocab_size=10**12)
    start = time.monotonic()
    assert "missing ['lm_head.weight']" in refusal(load, copy)
    assert time.monotonic() - start < 20


def test_a_hub_id_is_checked_like_a_folder(load, copy, loaded, tmp_path, monkeypatch):
    place = tmp_path / "hub/models--someone--small"
    (place / "refs").mkdir(parents=True)
    (place / "refs/main").write_text("0" * 40)
    shutil.copytree(copy, place / "snapshots" / ("0" * 40))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert same(load("someone/small"), loaded)
    edit(place / "snapshots" / ("0" * 40), model_type="qwen2_5_vl")
    assert "model_type='qwen2_5_vl' in config.json" in refusal(load, "someone/small")
    for other in ("someone/other", ""):
        assert f"{other!r} is not a folder, and the hub did not give it" in refusal(load, other)


ARGUMENTS = {
    "batch_size": ["autos", "auto:2", 0, -1, 1.5, "none", "", True, None],
    "min_pixels": ["large", 0, -5, "256*28*28", "nan", None],
    "max_pixels": ["large", 0, 100, "1e400", 3.5, None],
    "max_num_frames": ["all", 0, -1, 2.5],
    "max_length": ["long", 0],
    "fps": ["fast", 0, -1, "inf", True],
    "total_pixels": ["many", 0, 5],
    "use_cache": ["maybe", 2, ""],
    "interleave_visuals": ["maybe", 2],
    "enable_thinking": ["maybe", 2],
    "use_flash_attention_2": ["maybe", True, "True"],
    "attn_implementation": ["magic", "flash_attention_2", "flash_attention_3"],
    "pretrained": [None],
    "system_prompt": [None],
    "device_map": ["gpu", "meta", "disk", "cuda:77", "automatic", 77, True, [1]],
    "device": ["gpu", "meta", "cuda:77", [1]],
}


@pytest.mark.parametrize(("name", "value"), [(name, value) for name in ARGUMENTS for value in ARGUMENTS[name]], ids=str)
def test_a_value_that_is_not_allowed_is_one_sentence(wrapper, monkeypatch, name, value):
    monkeypatch.setattr("qwen_vl_vtr.arguments.is_flash_attn_2_available", lambda: False)
    given = {"pretrained": str(wrapper.checkpoint), "device": "cpu", name: value}
    known = name in inspect.signature(get_model(wrapper.stock).__init__).parameters
    with pytest.raises(SystemExit) as stop:
        get_model(wrapper.name)(**given)
    said = str(stop.value)
    assert said.startswith(f"{wrapper.name}: " + (f"{name}={value!r}: " if known else f"unknown argument {name!r}: "))
    assert re.search(r"allowed (is|are) |there is no CUDA device here|CUDA devices are numbered", said)
    assert "\n" not in said


def test_fewer_pixels_at_most_than_at_least_are_refused(wrapper):
    with pytest.raises(SystemExit) as stop:
        wrapper.load("min_pixels=100000,max_pixels=50000")
    assert str(stop.value) == (f"{wrapper.name}: max_pixels=50000: allowed is a whole number from min_pixels=100000 up")


def test_values_as_text_mean_what_they_say(wrapper):
    words = {
        "use_cache": "False",
        "interleave_visuals": "no",
        "batch_size": "2",
        "max_pixels": "2e6",
        "max_num_frames": "8",
    }
    lm = model_in(wrapper, wrapper.checkpoint, **words, reasoning_prompt=7, system_prompt=5)
    assert (lm.use_cache, lm.interleave_visuals, lm.batch_size) == (False, False, 2)
    assert (lm.max_pixels, lm.max_num_frames) == (2000000, 8)
    assert (lm.reasoning_prompt, lm.system_prompt) == ("7", "5")
    assert wrapper.load("use_cache=True,interleave_visuals=True,reasoning_prompt=None").reasoning_prompt is None


@pytest.mark.parametrize("device_map", ["auto", "balanced", "sequential", "cpu", "None", ""])
def test_without_a_gpu_any_placement_is_the_cpu(wrapper, monkeypatch, device_map):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    lm = get_model(wrapper.name).create_from_arg_string(f"pretrained={wrapper.checkpoint},device_map={device_map}")
    assert (lm.device_map, lm.device.type, lm.model.device.type) == ("cpu", "cpu", "cpu")
    assert wrapper.answers(lm, 1) == wrapper.answers(wrapper.load(""), 1)


@pytest.mark.parametrize(
    ("device", "device_map", "chosen"),
    [
        (None, None, ("cuda:1", "cuda:1")),
        (None, "auto", ("cuda:1", "auto")),
        ("cuda:0", "balanced", ("cuda:0", "balanced")),
        ("cpu", "auto", ("cpu", "cpu")),
        (None, "cuda:0", ("cuda:0", "cuda:0")),
        (0, 0, ("cuda:0", "cuda:0")),
        ("cuda:1", {"": 1}, ("cuda:1", {"": 1})),
    ],
)
def test_with_gpus_a_placement_is_what_it_says(monkeypatch, device, device_map, chosen):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert choose_devices(device, device_map, "cuda:1") == chosen


@pytest.mark.parametrize(
    ("device", "device_map", "words"),
    [
        ("cpu", "cuda:0", "device_map='cuda:0': allowed is what device='cpu' says, or one of the two"),
        ("cuda:0", "cuda:1", "device_map='cuda:1': allowed is what device='cuda:0' says, or one of the two"),
        (None, "cuda:2", "device_map='cuda:2': allowed are auto, balanced, "),
        ("cuda:2", None, "device='cuda:2': CUDA devices are numbered from 0, and there are 2"),
    ],
)
def test_devices_that_contradict_each_other_or_are_not_there_are_refused(monkeypatch, device, device_map, words):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(ValueError, match=words):
        choose_devices(device, device_map, "cuda:1")


@pytest.mark.parametrize("name", ["with,comma", "with='quote,s", "it's", "a [bracket", "A100B,x"])
def test_a_path_with_commas_is_given_in_quotes(wrapper, tmp_path, loaded, name):
    folder = shutil.copytree(wrapper.checkpoint, tmp_path / name)
    text = f'pretrained="{folder}",device=cpu,enabled=False'
    assert same(tensors(get_model(wrapper.name).create_from_arg_string(text)), loaded)


def test_a_path_cut_at_its_comma_is_one_sentence(wrapper):
    with pytest.raises(SystemExit, match=r'quotes around a value that has commas.*pretrained="/data/a,b"'):
        wrapper.load("resume_folder=/data/a,b")
    with pytest.raises(SystemExit, match=r"batch_size is among --model_args: give it as --batch_size 8"):
        get_model(wrapper.name).create_from_arg_string("batch_size=8", {"batch_size": 1, "device": None})
