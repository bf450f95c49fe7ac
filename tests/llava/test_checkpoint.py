"""Checkpoints and arguments of LLaVA."""

import json
import re
from pathlib import Path

import pytest
import torch
from checkpoint_checks import *  # noqa: F403
from checkpoint_checks import BESIDE, refusal, same, weights_of
from documents import evaluations
from lmms_checks import CHECKPOINTS, TASKS
from lmms_eval.models import get_model
from safetensors.torch import save_file

from comparison.lmms import Lmms
from llava.model.builder import load_pretrained_model


@pytest.fixture(scope="session")
def checkpoint() -> Path:
    return CHECKPOINTS / "shapes-llava"


@pytest.fixture(scope="session")
def load():
    return lambda folder: load_pretrained_model(str(folder), device="cpu")[1].state_dict()


@pytest.mark.parametrize("add", BESIDE, ids=lambda add: add.__name__)
def test_files_beside_the_vision_tower_are_ignored(load, copy, loaded, add):
    weights = weights_of(copy / "vision_tower")
    (copy / "vision_tower/tower.bin").write_bytes(b"no weights")
    weights["text_model.final_layer_norm.bias"] = torch.zeros(1)  # a CLIP's other half may lie among its weights
    save_file(weights, copy / "vision_tower/model.safetensors", {"format": "pt"})
    add(copy / "vision_tower")
    assert same(load(copy), loaded)


def test_safetensors_that_this_transformers_cannot_read_are_named(load, copy):
    save_file(weights_of(copy), copy / "model.safetensors")
    assert refusal(load, copy) == (
        f"{copy / 'model.safetensors'}: transformers 4.37 wants the metadata {{'format': 'pt'}} in it"
    )


def test_the_checkpoints_of_other_families_are_refused_for_what_they_are(load, checkpoint):
    for other in ("shapes-qwen2", "shapes-qwen3"):
        kind = json.loads((CHECKPOINTS / other / "config.json").read_text())["model_type"]
        assert f"model_type={kind!r}: want 'llava'" in refusal(load, CHECKPOINTS / other)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"device": "meta"}, "device='meta': allowed are cpu, cuda, cuda:1"),
        ({"device": [1]}, r"device=[1]: allowed are cpu, cuda, cuda:1"),
        ({"device": "cuda:77"}, "device='cuda:77': "),
        ({"dtype": ["float16"]}, "dtype=['float16']: allowed are float16"),
        ({"conv_template": ["vicuna_v1"]}, "conv_template=['vicuna_v1']: allowed are"),
        ({"attn_implementation": "flash_attention_2"}, "flash-attn or a GPU is missing"),
        ({"batch_size": 0}, "batch_size=0: allowed are a whole number from 1 up, and auto"),
        ({"batch_size": 1.5}, "batch_size=1.5: allowed are a whole number from 1 up, and auto"),
        ({"pretrained": 7}, "'7' is not a folder"),
    ],
)
def test_a_value_that_is_not_allowed_is_one_sentence(monkeypatch, checkpoint, arguments, words):
    monkeypatch.setattr("llava.model.builder.is_flash_attn_2_available", lambda: False)
    with pytest.raises(SystemExit) as stop:
        get_model("llava_vtr")(**{"pretrained": str(checkpoint), "device": "cpu"} | arguments)
    assert str(stop.value).startswith("llava_vtr: ")
    assert words in str(stop.value)


def words(model_args, folder):
    given = ["--model", "llava_vtr", "--model_args", model_args, "--tasks", "shapes", "--include_path", TASKS]
    return [*given, "--limit", 2, "--batch_size", 1, "--output_path", folder]


def test_the_documented_spelling_of_a_path_with_a_comma_works(lmms_eval, checkpoint, tmp_path):
    [documented] = [words[words.index("--model_args") + 1] for words in evaluations("llava_vtr") if '"' in str(words)]
    folder = tmp_path / "one,two"
    folder.symlink_to(checkpoint)
    path = re.search(r'"(/[^"]*,[^"]*)"', documented)[1]
    done = lmms_eval(*words(documented.replace(path, str(folder)), tmp_path / "results"))
    assert done.returncode == 0, done.stderr[-2000:]
    [results] = (tmp_path / "results").rglob("*results.json")
    assert json.loads(results.read_text())["results"]["shapes"]["accuracy,none"] == 1


def test_without_quotes_such_a_path_is_one_sentence_and_an_error(lmms_eval, tmp_path):
    done = lmms_eval(*words("pretrained=/data/one,two,keep_tokens=192", tmp_path / "results"))
    assert done.returncode == 1
    assert (
        "llava_vtr: --model_args pretrained=/data/one,two,keep_tokens=192: want name=value,... with quotes"
        in done.stderr
    )
    assert "Traceback" not in done.stderr


def test_the_table_of_strategies_takes_a_path_with_a_comma(checkpoint, tmp_path, loaded):
    folder = tmp_path / "one,two"
    folder.symlink_to(checkpoint)
    lm = Lmms("llava_vtr", str(folder), "batch_size=2", None).load({"enabled": False})
    assert same(lm.model.state_dict(), loaded)
