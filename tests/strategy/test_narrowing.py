"""Arguments of layers, narrowed to what is left."""

import pytest
import torch

from strategy.pruning.narrowing import KINDS, LayerKwargs

LENGTH, LEFT = 6, [0, 2, 5]


@pytest.fixture
def narrowed(monkeypatch):
    """What is left of a prompt, and how often something was narrowed."""
    plain, times = LayerKwargs._narrow, []

    def counted(self, name, given, mask_4d):
        times.append(name)
        return plain(self, name, given, mask_4d)

    monkeypatch.setattr(LayerKwargs, "_narrow", counted)
    return LayerKwargs(torch.tensor([LEFT]), None), times


def call(layer_kwargs, **kwargs):
    layer_kwargs.narrow(kwargs, mask_4d=True)
    return kwargs


def test_each_kind_of_layer_has_its_mask_narrowed_once(narrowed):
    layer_kwargs, times = narrowed
    masks = [torch.randn(1, 1, LENGTH, LENGTH) for _ in range(3)]
    found = [call(layer_kwargs, attention_mask=masks[layer % 3])["attention_mask"] for layer in range(12)]
    assert len(times) == 3
    for layer, mask in enumerate(found):
        assert torch.equal(mask, masks[layer % 3][:, :, LEFT][..., LEFT])


def test_a_new_object_is_narrowed_also_where_an_old_one_lay(narrowed):
    """Objects that come once are let go of, and the identities of these may come again."""
    layer_kwargs, times = narrowed
    for value in range(5 * KINDS):
        given = torch.full((1, LENGTH), value)
        assert call(layer_kwargs, position_ids=given)["position_ids"].tolist() == [[value] * len(LEFT)]
        del given
    assert len(times) == 5 * KINDS
    assert len(layer_kwargs.narrowed["position_ids"]) == KINDS


def test_none_is_one_object_and_other_arguments_stay(narrowed):
    layer_kwargs, times = narrowed
    other = object()
    for _ in range(2):
        found = call(layer_kwargs, attention_mask=None, past_key_values=other, cache_position=torch.arange(LENGTH))
    assert found["attention_mask"] is None
    assert found["past_key_values"] is other
    assert found["cache_position"].tolist() == [0, 1, 2]
    assert times.count("attention_mask") == 1


def test_two_kinds_of_rotary_tables_are_narrowed(narrowed):
    layer_kwargs, _ = narrowed
    tables = {name: (torch.randn(1, LENGTH, 4), torch.randn(1, LENGTH, 4)) for name in ("global", "local")}
    found = call(layer_kwargs, **{f"position_embeddings_{name}": pair for name, pair in tables.items()})
    for name, pair in tables.items():
        own = found[f"position_embeddings_{name}"]
        assert all(torch.equal(mine, whole[:, LEFT]) for mine, whole in zip(own, pair, strict=True))
