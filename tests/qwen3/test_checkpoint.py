"""Checkpoints and arguments of the lmms-eval model qwen3_vl_vtr."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from checkpoint_checks import edit, refusal, same, weights_of, write
from lmms_eval.models import get_model
from qwen_checkpoint_checks import *  # noqa: F403
from qwen_checkpoint_checks import model_in, tensors
from qwen_lmms_checks import Wrapper, qwen
from transformers import Qwen3VLForConditionalGeneration, Qwen3VLMoeConfig, Qwen3VLMoeForConditionalGeneration

EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 48, "model_type": "qwen3_vl_moe_text"}


@pytest.fixture(scope="session")
def wrapper() -> Wrapper:
    return qwen("qwen3_vl_vtr", "qwen3_vl", "shapes-qwen3", 32)


@pytest.fixture(scope="session")
def experts(wrapper, tmp_path_factory) -> Path:
    """A checkpoint of random experts, in a folder whose name does not say so."""
    folder = Path(shutil.copytree(wrapper.checkpoint, tmp_path_factory.mktemp("experts") / "copy"))
    edit(folder, "text_config", **EXPERTS)
    edit(folder, model_type="qwen3_vl_moe", architectures=["Qwen3VLMoeForConditionalGeneration"])
    torch.manual_seed(0)
    config = Qwen3VLMoeConfig.from_dict(json.loads((folder / "config.json").read_text()))
    Qwen3VLMoeForConditionalGeneration(config).to(torch.bfloat16).save_pretrained(folder)
    return folder


def with_name(folder, tmp_path, name):
    return Path(shutil.copytree(folder, tmp_path / name / "copy"))


@pytest.mark.parametrize("name", ["copy", "A3B", "Qwen3-VL-30B-A3B-Instruct"])
def test_experts_are_loaded_as_experts_in_any_folder(wrapper, experts, tmp_path, name):
    lm = model_in(wrapper, with_name(experts, tmp_path, name))
    assert type(lm.model) is Qwen3VLMoeForConditionalGeneration
    direct = Qwen3VLMoeForConditionalGeneration.from_pretrained(experts).float().state_dict()
    mine = tensors(lm)
    assert mine.keys() == direct.keys()
    assert all(torch.equal(mine[name], direct[name]) for name in direct)
    assert len(wrapper.answers(lm, 2)) == 2


@pytest.mark.parametrize("name", ["A100B", "Qwen3-VL-30B-A3B-Instruct"])
@pytest.mark.parametrize("force_simple", [False, True])
def test_a_dense_model_is_loaded_as_dense_in_any_folder(wrapper, loaded, tmp_path, name, force_simple):
    folder = with_name(wrapper.checkpoint, tmp_path, name)
    lm = get_model(wrapper.name, force_simple=force_simple)(pretrained=str(folder), device="cpu", enabled=False)
    assert lm.is_simple == force_simple
    assert type(lm.model) is Qwen3VLForConditionalGeneration
    assert same(tensors(lm), loaded)


def test_a_temporary_folder_that_looks_like_experts_is_named(wrapper, load, tmp_path, monkeypatch):
    (tmp_path / "A7B").mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "A7B"))
    folder = with_name(wrapper.checkpoint, tmp_path, "A100B")
    assert f"{folder}: set TMPDIR to a folder whose path does not match" in refusal(load, folder)


def test_the_link_for_the_wrapper_goes_with_the_model(wrapper, experts, tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    lm = model_in(wrapper, experts)
    assert len(list(tmp_path.iterdir())) == 1
    lm._links.cleanup()
    assert not list(tmp_path.iterdir())
    assert experts.is_dir()


@pytest.mark.parametrize("kind", ["safetensors", "sharded bin"])
@pytest.mark.parametrize(
    "part", ["layers.7.mlp.experts.down_proj", "layers.0.mlp.gate.weight", "layers.11.mlp.experts.gate_up_proj"]
)
def test_experts_without_a_tensor_are_refused_by_the_path_given(load, experts, tmp_path, part, kind):
    folder = with_name(experts, tmp_path, "experts")
    weights = weights_of(folder)
    write(folder, {name: tensor for name, tensor in weights.items() if part not in name}, kind)
    assert f"{folder}: the weights do not fit config.json: missing ['model.language_model.{part}']" in refusal(
        load, folder
    )


def test_experts_stored_either_way_round_are_the_same(load, experts, tmp_path):
    folder = with_name(experts, tmp_path, "experts")
    weights = weights_of(folder)
    turned = {name: t.transpose(1, 2).contiguous() if ".experts." in name else t for name, t in weights.items()}
    assert any(turned[name].shape != weights[name].shape for name in weights)
    one = load(folder)
    write(folder, turned, "safetensors")
    assert same(load(folder), one)
    for name in [name for name in turned if "layers.4.mlp.experts.gate_up_proj" in name]:
        turned[name] = turned[name].flatten(0, 1)
    write(folder, turned, "safetensors")
    assert "layers.4.mlp.experts.gate_up_proj is (" in refusal(load, folder)


def test_experts_and_dense_weights_are_not_taken_for_each_other(wrapper, load, experts, tmp_path):
    dense, folder = with_name(wrapper.checkpoint, tmp_path, "dense"), with_name(experts, tmp_path, "experts")
    dense_config, experts_config = (f / "config.json" for f in (dense, folder))
    texts = dense_config.read_text(), experts_config.read_text()
    dense_config.write_text(texts[1])
    experts_config.write_text(texts[0])
    assert re.search(r"missing \['.*mlp.experts.*left over", refusal(load, dense))
    assert re.search(r"missing \['.*mlp.down_proj.*left over", refusal(load, folder))


def test_errors_behind_the_link_name_the_path_given(load, experts, tmp_path):
    folder = with_name(experts, tmp_path, "experts")
    (folder / "tokenizer.json").write_text("{}")
    (folder / "tokenizer_config.json").unlink()
    said = refusal(load, folder)
    assert str(folder) in said
    assert "qwen3_vl_vtr_" not in said
