"""`compare` and `look` know the names that PriorTR has for options among the arguments of a model."""

import pytest

from comparison import cli, compare, look

MODEL = ["--model", "m", "--pretrained", "p"]


def test_a_budget_under_another_name_is_set_otherwise_too():
    words = ["--strategies", "clse", "--budgets", "64", "--tasks", "t", "--model_args", "vtr_keep_ratio=0.2"]
    given = compare.parse([*MODEL, *words])
    with pytest.raises(ValueError, match="leave out retain_ratio"):
        compare.options_of_runs(given)


def test_a_budget_under_another_name_reaches_the_configuration():
    given = look.parse([*MODEL, "--image", "i", "--question", "q", "--model_args", "keep_ratio=0.2,dtype=float32"])
    assert cli.take_options(given, look.SET_OTHERWISE, "")["retain_ratio"] == "0.2"
    assert given.model_args == "dtype=float32"
