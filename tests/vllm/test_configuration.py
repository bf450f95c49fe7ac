"""What a configuration says of pruning, and what it may not say beside it."""

import json
import logging
import shutil

import pytest
from engines import CHECKPOINTS
from vllm import EngineArgs, __version__

from vllm_vtr import families, versions
from vllm_vtr.configuration import facts, pruning_of

QWEN2 = CHECKPOINTS / "shapes-qwen2"
VTR = {"strategy": "clse", "keep_tokens": 192}


def configured(vtr, folder=QWEN2, **more):
    settings = {"dtype": "float32", "max_model_len": 1024, "additional_config": {"vtr": vtr}}
    return EngineArgs(model=str(folder), **settings | more).create_engine_config()


def refusal(vtr, folder=QWEN2, **more):
    with pytest.raises(ValueError, match="vtr") as error:
        configured(vtr, folder, **more)
    return str(error.value)


def test_without_vtr_nothing_is_changed():
    config = EngineArgs(model=str(QWEN2), dtype="float32").create_engine_config()
    assert config.model_config.hf_config.architectures == ["Qwen2VLForConditionalGeneration"]
    assert config.scheduler_config.scheduler_cls is None
    assert config.cache_config.enable_prefix_caching


def test_with_vtr_the_model_and_the_scheduler_prune(caplog):
    logging.getLogger("vllm").propagate = True
    with caplog.at_level(logging.INFO, "vllm.vtr"):
        config = configured(VTR)
    assert config.model_config.hf_config.architectures == ["PrunedQwen2VLForConditionalGeneration"]
    assert not config.cache_config.enable_prefix_caching
    assert "strategy=clse behind layers 0, 3, 7 of 12, to 0.57" in caplog.text
    assert "turns prefix caching off" in caplog.text
    assert pruning_of(config).plan.layers == (1, 4, 8)


@pytest.mark.parametrize(
    ("vtr", "said"),
    [
        ({"strategy": "clse", "keep_token": 192}, "unknown argument 'keep_token': did you mean 'keep_tokens'"),
        ({"strategy": "nothing"}, "strategy='nothing': allowed are"),
        ({"strategy": "clse", "keep_tokens": 0}, "keep_tokens=0"),
        ({"strategy": "clse", "engine": "graph"}, "engine='graph': vLLM runs the model here, so leave engine out"),
        ({"strategy": "random", "prune_layer": 40}, "the decoder has 12 layers"),
        ("clse", "vtr='clse': give a mapping, such as"),
        (
            {"strategy": "cdpruner", "clip_text": "openai/clip"},
            "no text tower of CLIP beside the model; omit clip_text",
        ),
    ],
)
def test_wrong_options_are_named(vtr, said):
    assert said in refusal(vtr)


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"pipeline_parallel_size": 2}, "split the model by tensor_parallel_size"),
        ({"tensor_parallel_size": 4}, "tensor_parallel_size=4 copies the 2 key heads: choose a divisor of 2"),
        ({"enable_lora": True}, "merge the adapter into the weights"),
        ({"attention_config": {"backend": "FLASHINFER"}}, "give attention_backend=FLASH_ATTN"),
        ({"scheduler_cls": "some.Scheduler"}, "leave one of the two out"),
        ({"compilation_config": {"cudagraph_mode": "FULL"}}, "use FULL_AND_PIECEWISE"),
        (
            {"kv_transfer_config": {"kv_connector": "ExampleConnector", "kv_role": "kv_both"}},
            "leave kv_transfer_config",
        ),
        ({"speculative_config": {"method": "ngram", "num_speculative_tokens": 2}}, "leave speculative_config out"),
    ],
)
def test_what_does_not_go_with_pruning_is_named(more, said):
    assert said in refusal(VTR, **more)


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"tensor_parallel_size": 2}, "whose heads tensor_parallel_size=2 splits: use data_parallel_size"),
        (
            {"compilation_config": {"cudagraph_mm_encoder": True}},
            "leave compile_mm_encoder and cudagraph_mm_encoder out",
        ),
        ({"compilation_config": {"compile_mm_encoder": True}}, "leave compile_mm_encoder and cudagraph_mm_encoder out"),
    ],
)
def test_what_hides_the_vision_tower_is_named(more, said):
    assert said in refusal({"strategy": "visionzip", "keep_tokens": 96}, **more)
    configured(VTR, **more)


def test_model_runner_v1_is_refused(monkeypatch):
    monkeypatch.setenv("VLLM_USE_V2_MODEL_RUNNER", "0")
    assert "set VLLM_USE_V2_MODEL_RUNNER=1" in refusal(VTR)


def test_another_model_is_refused_by_name(tmp_path):
    folder = shutil.copytree(QWEN2, tmp_path / "other")
    config = json.loads((folder / "config.json").read_text())
    text = config["text_config"] | {"model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"]}
    (folder / "config.json").write_text(json.dumps(text))
    assert "Qwen2ForCausalLM is not a model that is pruned; these are: Llava" in refusal(VTR, folder)


def test_the_version_at_hand_is_tested_and_has_the_functions_that_are_overridden(caplog):
    logging.getLogger("vllm").propagate = True
    versions.check()
    assert __version__.startswith(versions.TESTED)
    assert "is tested with" not in caplog.text


def test_a_function_with_other_parameters_is_named(monkeypatch):
    stock = versions.wanted()
    changed = {next(iter(stock)): (("something",), ("other",))}
    monkeypatch.setattr(versions, "wanted", lambda: changed)
    with pytest.raises(ValueError, match=r"_update_after_schedule of .* where \('something',\) or \('other',\) were"):
        versions.check()


def test_another_version_is_a_warning(monkeypatch, caplog):
    logging.getLogger("vllm").propagate = True
    monkeypatch.setattr(versions, "__version__", "0.99.0")
    versions.check()
    assert "vtr is tested with vLLM 0.26 and 0.32; this is 0.99.0" in caplog.text


def test_every_family_has_its_classes():
    for architecture, family in families.FAMILIES.items():
        module = __import__(f"vllm_vtr.models.{family.module}", fromlist=["x"])
        assert issubclass(getattr(module, families.PREFIX + architecture), module.Pruned)


def test_the_cost_of_attention_is_that_of_the_projects_own_engine(folders):
    from engines import Reference

    from strategy.backbone import find_backbone

    model = Reference(QWEN2).model
    own = find_backbone(model).facts(model.model.language_model)
    assert facts(configured(VTR).model_config.hf_text_config, True) == own
