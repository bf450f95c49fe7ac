"""The list of families, and former names."""

import importlib
import warnings

import pytest

import strategy
from strategy.backbone import _backbones, find_backbone, register_backbone


class Backbone(strategy.Backbone):
    name = "made_up"
    models = ()
    decoders = (int,)
    nominal_tokens = 1
    decoder = entry = layout = rotary = lambda *_: None


def test_a_family_is_found_by_its_decoder(monkeypatch):
    monkeypatch.setattr("strategy.backbone._backbones", dict(_backbones))
    own = Backbone()
    register_backbone(own)
    assert find_backbone(3, "made_up") is own


@pytest.mark.parametrize("name", ["closing", "of_sizes", "greedy", "angles", "added"])
def test_an_adapter_with_a_former_name_is_refused(monkeypatch, name):
    monkeypatch.setattr(Backbone, name, (), raising=False)
    with pytest.raises(ValueError, match=rf"^Backbone: attributes of Backbone were renamed: rename {name} to \w+$"):
        register_backbone(Backbone())
    assert "made_up" not in _backbones


def test_a_class_that_is_no_strategy_is_refused(monkeypatch):
    monkeypatch.setattr(strategy.registry, "_strategies", dict(strategy.registry._strategies))
    monkeypatch.setattr("strategy.backbone._backbones", dict(_backbones))
    strategy.register("made_up")(dict)
    register_backbone(Backbone())
    model = type("Model", (int,), {"layers": []})()
    with pytest.raises(ValueError, match=r"^made_up: dict is registered, but it is no strategy\.Strategy$"):
        strategy.attach(model, strategy.VTRConfig(strategy="made_up"), layout=[[]])


@pytest.mark.parametrize(
    ("module", "name", "place", "now"),
    [
        ("strategy", "Asked", "strategy", "GreedyRequest"),
        ("strategy.parallel", "split", "strategy.distributed.tensor_parallel", "split"),
        ("strategy.zero", "shard", "strategy.distributed.zero", "shard"),
        ("strategy.zero", "in_step", "strategy.distributed.zero", "lockstep"),
    ],
)
def test_former_names_work_and_warn(module, name, place, now):
    with pytest.warns(DeprecationWarning, match=now):
        found = getattr(importlib.import_module(module), name)
    assert found is getattr(importlib.import_module(place), now)
    with pytest.raises(AttributeError, match="nothing"):
        _ = importlib.import_module(module).nothing


def test_importing_the_package_warns_of_nothing():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        importlib.reload(importlib.import_module("strategy.parallel"))
        importlib.reload(importlib.import_module("strategy.zero"))
