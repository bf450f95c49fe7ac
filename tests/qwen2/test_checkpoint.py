"""Checkpoints and arguments of the lmms-eval model qwen2_vl_vtr."""

import pytest
from checkpoint_checks import refusal, same, weights_of, write
from qwen_checkpoint_checks import *  # noqa: F403
from qwen_lmms_checks import Wrapper, qwen


@pytest.fixture(scope="session")
def wrapper() -> Wrapper:
    return qwen("qwen2_vl_vtr", "qwen2_vl", "shapes-qwen2", 28)


def new_name(name):
    """The name of a tensor that transformers 4.52 and later write; the small checkpoint has the old ones."""
    if name.startswith("visual."):
        return f"model.{name}"
    return name.replace("model.", "model.language_model.", 1)


def test_old_and_new_names_of_tensors_load_alike(load, copy, loaded):
    weights = weights_of(copy)
    assert {name for name in weights if new_name(name) == name} == {"lm_head.weight"}
    write(copy, {new_name(name): tensor for name, tensor in weights.items()}, "safetensors")
    assert same(load(copy), loaded)


def test_a_tensor_under_both_names_is_refused(load, copy):
    weights = weights_of(copy)
    [name] = [name for name in weights if "layers.2.self_attn.o_proj" in name]
    write(copy, weights | {new_name(name): weights[name]}, "safetensors")
    assert f"there are two tensors for {new_name(name)}" in refusal(load, copy)
