"""VisPruner by hand, and beside its rule in plain Python."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from views import view_of

from strategy import VTRConfig, registry
from strategy.base import EncoderView
from strategy.vispruner import most_distinct


def make(**knobs):
    return registry.get("vispruner")(VTRConfig(strategy="vispruner", **knobs))


def at_angles(*degrees):
    """Tokens [1, N, 2] at angles, with different lengths, which do not count."""
    angles = torch.tensor(degrees, dtype=torch.float32).deg2rad()
    return (torch.stack([angles.cos(), angles.sin()], dim=1) * torch.arange(1, len(degrees) + 1)[:, None])[None]


def test_of_every_second_token_those_most_like_the_others_go():
    # 0, 2 and 4 at 0, 50 and 200 degrees are compared with 1 and 3 at 45 and 90: 45, 5 and 110 off. One goes: token 2.
    features, order = at_angles(0, 45, 50, 90, 200), torch.arange(5)[None]
    assert most_distinct(features, order, 4).tolist() == [[0, 4, 1, 3]]
    # Two go: 2 and 0.
    assert most_distinct(features, order, 3).tolist() == [[4, 1, 3]]
    # Three go at once, which is every second one; up to eight may.
    assert most_distinct(features, order, 2).tolist() == [[1, 3]]
    # Then 1 is compared with 3, and goes.
    assert most_distinct(features, order, 1).tolist() == [[3]]
    assert most_distinct(features, order, 0).tolist() == [[]]


def test_half_by_attention_and_half_by_what_differs():
    # The mean over heads falls from token 5 to token 0. Kept are 5 and 4, and three of 3 2 1 0: of 3 and 1, at 0 and 80
    # degrees, 1 is more like one of 2 and 0, at 90 and 180, and goes.
    attention = torch.tensor([[0.0, 0.3, 0.2, 0.5, 0.8, 1.0], [0.0, 0.1, 0.4, 0.3, 0.2, 0.4]])
    features = at_angles(180, 80, 90, 0, 10, 20)
    encoder = EncoderView(attention[None], torch.zeros(1, 1, 6, 1), features)
    view = view_of(torch.zeros(1, 6, 2), torch.zeros(1, 1, 1, 6), keep=5, encoder=encoder)
    assert make().select(view).tolist() == [[0, 2, 3, 4, 5]]
    assert make(important_ratio=1).select(view).tolist() == [[1, 2, 3, 4, 5]]


def by_rule(features, order, count):
    """The rule in plain Python: of equal ones the first goes."""

    def cosine(a, b):
        dot = sum(x * y for x, y in zip(features[a], features[b], strict=True))
        return dot / math.hypot(*features[a]) / math.hypot(*features[b])

    while len(order) > count:
        one, other = order[::2], order[1::2]
        alike = sorted(one, key=lambda a: -max(cosine(a, b) for b in other))
        order = alike[min(8, len(order) - count) :] + other
    return order


@given(seed=st.integers(0, 10**6), size=st.integers(1, 40), data=st.data())
def test_the_turns_are_those_of_the_rule(seed, size, data):
    count, generator = data.draw(st.integers(1, size)), torch.Generator().manual_seed(seed)
    features = torch.randn(2, size, 4, generator=generator)
    order = torch.stack([torch.randperm(size, generator=generator) for _ in range(2)])
    found = most_distinct(features, order, count)
    for sample in range(2):
        assert found[sample].tolist() == by_rule(features[sample].double().tolist(), order[sample].tolist(), count)


@pytest.mark.parametrize("ratio", [0, 0.3, 0.5, 1])
@pytest.mark.parametrize("keep", [1, 2, 9, 39])
def test_the_budget_is_met_and_batches_are_their_samples(keep, ratio):
    generator = torch.Generator().manual_seed(0)
    attention, features = torch.rand(3, 2, 40, generator=generator), torch.randn(3, 40, 8, generator=generator)

    def selected(which):
        encoder = EncoderView(attention[which], features[which][:, None], features[which])
        view = view_of(features[which], torch.zeros(len(features[which]), 1, 1, 40), keep=keep, encoder=encoder)
        return make(important_ratio=ratio).select(view)

    together = selected(slice(None))
    assert together.shape == (3, keep)
    assert (together.diff(dim=1) > 0).all()
    for sample in range(3):
        assert torch.equal(together[sample : sample + 1], selected(slice(sample, sample + 1)))
