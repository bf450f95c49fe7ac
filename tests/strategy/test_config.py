"""What people type, and what they are told when it is wrong."""

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from strategy import VTRConfig, available
from strategy.config import describe_options, field_names, strategy_options


@pytest.mark.parametrize("value", [192, "192", 192.0, [192], "[192]", " 192 "])
def test_a_budget_may_be_typed_in_many_ways(value):
    assert VTRConfig(keep_tokens=value).keep_tokens == (192,)


@pytest.mark.parametrize("value", [[1, 11, 21], (1, 11, 21), "[1,11,21]", "1;11;21", "1, 11, 21", "(1;11;21)"])
def test_so_may_layers(value):
    assert VTRConfig(prune_layer=value).prune_layer == (1, 11, 21)


@pytest.mark.parametrize(("value", "flag"), [("False", False), ("true", True), (0, False), (1, True), (False, False)])
def test_a_flag_means_what_it_says(value, flag):
    assert VTRConfig(enabled=value, clse_fft_3d=value).enabled is flag
    assert VTRConfig(enabled=value, clse_fft_3d=value).clse_fft_3d is flag


def test_nothing_given_is_left_to_the_strategy():
    config = VTRConfig(keep_tokens=None, prune_layer="None", ref_layers="")
    assert (config.keep_tokens, config.prune_layer, config.ref_layers) == (None, None, None)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"keep_token": 192}, ["keep_token", "did you mean 'keep_tokens'"]),
        ({"something_else": 1}, ["something_else", "retain_ratio"]),
        ({"keep_tokens": 192, "retain_ratio": 0.3}, ["keep_tokens", "retain_ratio", "one of the two"]),
        ({"retain_ratio": 0}, ["retain_ratio=0", "above 0"]),
        ({"retain_ratio": "1.01"}, ["retain_ratio='1.01'", "up to 1"]),
        ({"retain_ratio": "nan"}, ["retain_ratio='nan'"]),
        ({"keep_tokens": 0}, ["keep_tokens=0", "from 1 up"]),
        ({"keep_tokens": 1.5}, ["keep_tokens=1.5", "whole number"]),
        ({"keep_tokens": True}, ["keep_tokens=True"]),
        ({"prune_layer": [11, 1]}, ["prune_layer=[11, 1]", "increasing"]),
        ({"prune_layer": [-1, 1]}, ["prune_layer=[-1, 1]", "from 0 up"]),
        ({"prune_layer": "1;x"}, ["prune_layer='1;x'"]),
        ({"ref_layers": [0, 1]}, ["ref_layers=[0, 1]", "one layer"]),
        ({"keep_tokens": [9, 5], "prune_layer": [1, 2, 3]}, ["keep_tokens=[9, 5]", "3 stages"]),
        ({"strategy": "clze"}, ["strategy='clze'", ", ".join(available())]),
        ({"budget_basis": "tokens"}, ["budget_basis='tokens'", "stages, mean, flops"]),
        ({"enabled": "maybe"}, ["enabled='maybe'", "True and False"]),
        ({"clse_temp": 0}, ["clse_temp=0", "above 0"]),
        ({"clse_temp": 1e-45}, ["clse_temp=1e-45", "from 1e-6 to 1e6"]),
        ({"clse_cutoff_ratio": 1e300}, ["clse_cutoff_ratio=1e+300", "from 1e-6 to 1e6"]),
        ({"clse_cutoff_ratio": "wide"}, ["clse_cutoff_ratio='wide'"]),
    ],
)
def test_what_is_wrong_is_named_with_what_is_allowed(arguments, words):
    with pytest.raises(ValueError, match=r"allowed|one of the two|want one number") as error:
        VTRConfig(**arguments)
    assert all(word in str(error.value) for word in words), error.value


def test_the_prefixed_names_are_the_same_knobs():
    arguments = {"vtr_keep_tokens": 64, "strategy": "random", "pretrained": "somewhere"}
    assert VTRConfig.take(arguments) == VTRConfig(keep_tokens=64, strategy="random")
    assert arguments == {"pretrained": "somewhere"}
    with pytest.raises(ValueError, match="vtr_keep_tokens are the same"):
        VTRConfig.take({"vtr_keep_tokens": 64, "keep_tokens": 64})


def test_an_option_that_the_strategy_does_not_use_is_refused_with_those_that_do():
    with pytest.raises(
        ValueError, match=r"^head_aggregation='max': strategy=fastv does not use it.* priortr or priortr_2f$"
    ):
        VTRConfig(strategy="fastv", head_aggregation="max")
    with pytest.raises(ValueError, match=r"^clse_temp=0.2: strategy=random does not use it.* choose clse$"):
        VTRConfig(strategy="random", clse_temp=0.2)


def test_options_of_a_strategy_are_read_from_its_configuration():
    config = VTRConfig(strategy="priortr", head_aggregation="max")
    assert (config.head_aggregation, config.query_aggregation) == ("max", "question")
    assert config == VTRConfig(strategy="priortr", head_aggregation="max") != VTRConfig(strategy="priortr")
    with pytest.raises(AttributeError, match="strategy=priortr has no 'clse_temp'"):
        _ = config.clse_temp


def test_the_values_have_the_strategys_own_among_them_and_make_the_same_configuration():
    config = VTRConfig(strategy="priortr", head_aggregation="max", keep_tokens=64)
    values = config.values()
    assert set(values) == {*VTRConfig.names(), "query_aggregation", "head_aggregation"}
    assert (values["keep_tokens"], values["head_aggregation"]) == ((64,), "max")
    assert VTRConfig(**values) == config


def test_every_option_has_a_default_and_a_sentence():
    described = describe_options()
    assert tuple(described) == field_names()
    assert set(strategy_options()) < set(described)
    for name, (default, sentence) in described.items():
        assert sentence.endswith("."), name
        assert name in strategy_options() or getattr(VTRConfig(), name) == default


def test_a_config_cannot_be_changed():
    with pytest.raises(dataclasses.FrozenInstanceError):
        VTRConfig().keep_tokens = 3


anything = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), st.text(), st.lists(st.one_of(st.integers(), st.text()))
)


@given(st.dictionaries(st.sampled_from(field_names()), anything))
def test_anything_typed_gives_a_config_or_one_value_error(arguments):
    try:
        config = VTRConfig(**arguments)
    except ValueError as refusal:
        message = str(refusal)
    else:
        message = ", ".join(arguments)
        assert config.strategy in available()
        assert config.keep_tokens is None or min(config.keep_tokens) >= 1
        assert config.retain_ratio is None or 0 < min(config.retain_ratio) <= max(config.retain_ratio) <= 1
    assert not arguments or any(name in message for name in arguments)
