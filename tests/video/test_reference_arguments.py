"""Command lines of PriorTR, as the two scripts of Video-LLaVA take them."""

import pytest

import strategy
from videollava.eval.video import eval_video_qa
from videollava.eval.video.run_inference_video_qa import parse

DATA = ["--model_path", "m", "--video_dir", "v", "--gt_file_question", "q", "--gt_file_answers", "a"]
DATA += ["--output_dir", "o", "--output_name", "pred"]
VIDEO = strategy.Facts(depth=32, nominal_tokens=2048, video=True)


def config(*words):
    return strategy.VTRConfig.take(dict(vars(parse([*DATA, "--vtr_enabled", *words]))))


@pytest.mark.parametrize(
    ("words", "same"),
    [
        ("--vtr_keep_ratio 0.25", {"retain_ratio": 0.25}),
        ("--vtr_strategy fastv --vtr_query_aggregation auto", {"strategy": "fastv"}),
        ("--vtr_strategy fastv --vtr_query_aggregation question --vtr_head_aggregation mean", {"strategy": "fastv"}),
        ("--vtr_strategy priortr_2f --vtr_query_aggregation auto", {"strategy": "priortr_2f"}),
        ("--vtr_ref_layers 1", {"ref_layers": 1}),
        ("--vtr_prune_layer 3 --vtr_ref_layers 2", {"prune_layer": 3, "ref_layers": 2}),
        ("--vtr_prune_layer 3 9 --vtr_keep_tokens 300 99", {"prune_layer": [3, 9], "keep_tokens": [300, 99]}),
        ("--vtr_prune_layer 3;9 --vtr_keep_ratio 0.2 0.1", {"prune_layer": [3, 9], "retain_ratio": [0.2, 0.1]}),
    ],
)
def test_options_are_taken_as_typed(words, same):
    assert config(*words.split()) == strategy.VTRConfig(**same)


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ("--vtr_ref_layers 1 2", r"^ref_layers=\['1', '2'\]: allowed is one layer from 0 up$"),
        ("--vtr_strategy clse fastv", r"^strategy=\['clse', 'fastv'\]: allowed are "),
        ("--vtr_clse_temp 1 2", r"^clse_temp=\['1', '2'\]: allowed is a number"),
        ("--vtr_keep_ratio 0.2 --vtr_retain_ratio 0.2", "keep_ratio and retain_ratio are the same argument"),
        ("--vtr_keep_ratio 0.2 --vtr_keep_tokens 64", "give one of the two"),
        ("--vtr_strategy fastv --vtr_query_aggregation last", "strategy=fastv does not use it: leave it out"),
    ],
)
def test_what_has_no_meaning_is_one_sentence(words, told):
    with pytest.raises(ValueError, match=told):
        config(*words.split())


def test_the_reference_follows_the_layer_that_is_pruned_at():
    plan = strategy.registry.get("clse")(config("--vtr_prune_layer", "7")).plan(VIDEO)
    assert (plan.layers, plan.reference) == ((7,), 6)


def test_the_judge_has_two_names(capsys):
    words = ["--pred_path", "pred.json", "--api_key", "k"]
    for name in ("--model", "--judge_model"):
        assert eval_video_qa.parse([*words, name, "gpt-4o"])[1].judge_model == "gpt-4o"
    assert eval_video_qa.parse(words)[1].judge_model is None
    with pytest.raises(SystemExit):
        eval_video_qa.parse([*words, "--model", "a", "--judge_model", "b"])
    assert "--model and --judge_model are the same argument: give one of the two" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        eval_video_qa.parse([*words[:2], "--model", "a"])
    assert "say where it is with --api_base or --api_key" in capsys.readouterr().err
