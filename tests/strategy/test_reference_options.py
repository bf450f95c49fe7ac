"""The options as command lines of PriorTR have them."""

import re

import pytest

from strategy import Facts, VTRConfig, available, registry
from strategy.config import ALIASES, strategy_options

VIDEO = Facts(depth=32, nominal_tokens=2048, video=True)
PICTURE = Facts(depth=32, nominal_tokens=576)
OWNERS = [(name, strategy) for name, users in strategy_options().items() for strategy in available()]


@pytest.mark.parametrize("name", ["keep_ratio", "vtr_keep_ratio"])
@pytest.mark.parametrize("value", ["0.2222", 0.2222, [0.5, 0.25, 0.1], "0.5;0.25;0.1"])
def test_a_ratio_has_two_names(name, value):
    arguments = {name: value, "pretrained": "somewhere"}
    assert VTRConfig.take(arguments) == VTRConfig(retain_ratio=value)
    assert arguments == {"pretrained": "somewhere"}
    assert VTRConfig(keep_ratio=value) == VTRConfig(retain_ratio=value)


@pytest.mark.parametrize("alias", ALIASES)
def test_an_option_is_given_under_one_of_its_names(alias):
    name = ALIASES[alias]
    for one, other in [(alias, name), (f"vtr_{alias}", name), (alias, f"vtr_{name}"), (alias, f"vtr_{alias}")]:
        with pytest.raises(ValueError, match=f"{alias} and .* are the same argument: give one of the two"):
            VTRConfig.take({one: 0.2, other: 0.2})
    with pytest.raises(ValueError, match="keep_ratio and retain_ratio are the same argument"):
        VTRConfig(keep_ratio=0.2, retain_ratio=0.2)
    with pytest.raises(ValueError, match=r"^keep_ratio='much': allowed is a ratio above 0"):
        VTRConfig.take({"vtr_keep_ratio": "much"})


@pytest.mark.parametrize("strategy", available())
def test_auto_is_the_strategys_own_aggregation(strategy):
    assert VTRConfig(strategy=strategy, query_aggregation="auto") == VTRConfig(strategy=strategy)


def another_value(options, name):
    """A value of an option that is not its default."""
    read, default = options.reader(name), options.describe()[name][0]
    try:
        read(name, "no such word")
        words = ["another"]
    except ValueError as error:
        words = re.findall(r"\w+", str(error).partition("allowed are ")[2])
    for value in (not default, 7, 0.7, *words):
        try:
            if read(name, value) != read(name, default):
                return value
        except ValueError:
            continue
    raise AssertionError(f"no other value of {name} was found")


@pytest.mark.parametrize(("name", "strategy"), OWNERS)
def test_an_option_at_its_default_is_accepted_by_all_and_otherwise_by_its_strategies(name, strategy):
    users = strategy_options()[name]
    default = registry.get(users[0]).options_type.describe()[name][0]
    other = another_value(registry.get(users[0]).options_type, name)
    for value in (default, str(default)):
        assert VTRConfig(strategy=strategy, **{name: value}) == VTRConfig(strategy=strategy)
    if strategy in users:
        assert VTRConfig(strategy=strategy, **{name: other}) != VTRConfig(strategy=strategy)
        return
    with pytest.raises(
        ValueError, match=f"^{name}=.*: strategy={strategy} does not use it: .* choose {' or '.join(users)}$"
    ):
        VTRConfig(strategy=strategy, **{name: other})


def test_a_value_that_is_none_is_no_default():
    with pytest.raises(ValueError, match="query_aggregation='middle': strategy=fastv does not use it"):
        VTRConfig(strategy="fastv", query_aggregation="middle")


@pytest.mark.parametrize("strategy", ["clse", "random"])
@pytest.mark.parametrize(
    ("facts", "given", "layers", "reference"),
    [
        (VIDEO, {}, (3,), 2),
        (VIDEO, {"prune_layer": 5}, (5,), 4),
        (VIDEO, {"prune_layer": 1}, (1,), 0),
        (VIDEO, {"prune_layer": [4, 9], "keep_tokens": [300, 100]}, (4, 9), 3),
        (VIDEO, {"prune_layer": 5, "ref_layers": 1}, (5,), 1),
        (VIDEO, {"prune_layer": 5, "ref_layers": 0}, (5,), 0),
        (PICTURE, {"prune_layer": 5}, (5,), 0),
    ],
)
def test_on_videos_the_reference_is_the_layer_before_the_prune(strategy, facts, given, layers, reference):
    plan = registry.get(strategy)(VTRConfig(strategy=strategy, **given)).plan(facts)
    assert (plan.layers, plan.reference) == (layers, reference)
