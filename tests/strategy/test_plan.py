"""Where each strategy prunes, and how many tokens each budget leaves."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

import strategy
from strategy import Facts, Strategy, VTRConfig, available, registry
from strategy.base import Plan, StageBudgets
from strategy.registry import broken

LLAVA = Facts(depth=32, nominal_tokens=576)
QWEN = Facts(depth=28, nominal_tokens=576, own_size=True)
VIDEO = Facts(depth=32, nominal_tokens=2048, video=True)


def plan(facts, **knobs):
    config = VTRConfig(**knobs)
    return registry.get(config.strategy)(config).plan(facts)


@pytest.mark.parametrize(
    ("keep_tokens", "retain_ratio", "kept"),
    [(192, 0.334, (330, 210, 62)), (128, 0.223, (220, 140, 41)), (64, 0.112, (110, 70, 20))],
)
def test_the_published_budgets_of_llava(keep_tokens, retain_ratio, kept):
    assert plan(LLAVA, keep_tokens=keep_tokens).kept(576) == kept
    assert plan(LLAVA, retain_ratio=retain_ratio).kept(576) == kept


@pytest.mark.parametrize(
    ("keep_tokens", "retain_ratio", "kept"),
    [(192, 0.334, (319, 201, 54)), (128, 0.223, (212, 134, 36)), (64, 0.112, (106, 67, 19))],
)
def test_the_published_budgets_of_the_qwens_are_shares_of_an_images_own_tokens(keep_tokens, retain_ratio, kept):
    assert plan(QWEN, retain_ratio=retain_ratio).kept(560) == kept
    assert plan(QWEN, keep_tokens=keep_tokens).kept(560) == kept


def test_budgets_between_the_published_ones():
    assert plan(LLAVA, keep_tokens=100).kept(576) == (172, 109, 32)
    assert plan(LLAVA, retain_ratio=0.25).kept(576) == (247, 156, 46)
    assert plan(QWEN, retain_ratio=0.25).kept(1000) == (430, 272, 80)
    assert plan(QWEN, keep_tokens=144).kept(1000) == (430, 272, 80)


def test_video_has_one_stage():
    assert plan(VIDEO).layers == (3,)
    assert plan(VIDEO).reference == 2
    assert plan(VIDEO).kept(2048) == (194,)
    assert plan(VIDEO, keep_tokens=64).kept(2048) == (64,)
    assert plan(VIDEO, retain_ratio=0.1).kept(2048) == (204,)


def test_a_number_a_stage():
    assert plan(LLAVA, keep_tokens=[300, 200, 100]).kept(576) == (300, 200, 100)
    assert plan(LLAVA, retain_ratio=[0.5, 0.25], prune_layer=[2, 9]).kept(576) == (288, 144)
    assert plan(QWEN, retain_ratio=[0.5, 0.25, 0.1]).kept(100) == (50, 25, 10)
    assert plan(LLAVA, keep_tokens=64, prune_layer=5).kept(576) == (64,)


def test_one_number_is_what_a_single_stage_keeps_however_several_would_share_it():
    for shared in ({"weights": (1.5, 0.5)}, {"stages": (150, 50)}):
        budget = StageBudgets((100,), None, **shared)
        assert Plan.resolve((4, 8), None, budget, LLAVA).kept(576) == (150, 50)
        assert Plan.resolve((4,), None, budget, LLAVA).kept(576) == (100,)


def test_a_stage_never_gains_tokens_and_never_loses_the_last_one():
    assert plan(LLAVA, keep_tokens=[100, 300, 50]).kept(576) == (100, 100, 50)
    assert plan(LLAVA, keep_tokens=1).kept(576) == (1, 1, 1)
    assert plan(QWEN, retain_ratio=0.01).kept(3) == (1, 1, 1)
    assert plan(LLAVA, keep_tokens=192).kept(9) == (9, 9, 9)


@pytest.mark.parametrize(
    ("knobs", "words"),
    [
        ({"prune_layer": [1, 2, 32]}, "32 layers"),
        ({"prune_layer": [3, 9, 20], "ref_layers": 3}, "below the first pruned one, 3"),
        ({"keep_tokens": [9, 5]}, "each of the 3 stages"),
        ({"keep_tokens": 9, "prune_layer": [1, 2]}, "each of the 2 stages.*a single one is shared by 3 only"),
    ],
)
def test_what_does_not_fit_the_decoder_is_refused(knobs, words):
    with pytest.raises(ValueError, match=words):
        plan(LLAVA, **knobs)


@given(
    name=st.sampled_from(available()),
    facts=st.builds(
        Facts,
        depth=st.integers(5, 80),
        nominal_tokens=st.integers(1, 4096),
        own_size=st.booleans(),
        video=st.booleans(),
    ),
    budget=st.one_of(
        st.builds(lambda n: {"keep_tokens": n}, st.integers(1, 5000)),
        st.builds(lambda r: {"retain_ratio": r}, st.floats(0.001, 1)),
    ),
    count=st.integers(1, 3000),
)
def test_any_budget_keeps_between_one_and_all_and_ever_fewer(name, facts, budget, count):
    kept = plan(facts, strategy=name, **budget).kept(count)
    assert list(kept) == sorted(kept, reverse=True)
    assert 1 <= kept[-1] <= kept[0] <= count


def test_a_name_is_registered_once():
    with pytest.raises(ValueError, match="'clse' is registered already"):
        registry.register("clse")(Strategy)


def test_no_file_here_is_left_out():
    assert not broken


@pytest.mark.parametrize("wrong", ["def f(:", "import nothing_of_this_name", "from strategy import clse\n1 / 0"])
def test_a_broken_file_is_named_and_takes_no_other_strategy_with_it(tmp_path, wrong):
    shutil.copytree(Path(strategy.__file__).parent, tmp_path / "strategy", ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / "strategy/wrong.py").write_text(wrong)
    body = "import strategy; strategy.VTRConfig(); strategy.VTRConfig(strategy='wrong')"
    done = subprocess.run([sys.executable, "-c", body], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert "UserWarning: left out of the strategies: wrong.py (" in done.stderr
    last = done.stderr.splitlines()[-1]
    allowed = ", ".join(strategy.available())
    assert last.startswith(f"ValueError: strategy='wrong': allowed are {allowed}; left out: wrong.py (")


@pytest.mark.parametrize("defaults", [{}, {"tokens": 192, "ratio": 0.3}])
def test_a_default_budget_is_in_tokens_or_a_ratio(defaults):
    with pytest.raises(ValueError, match="give one of the two as the default"):
        registry.get("clse")(VTRConfig()).budget(**defaults)
