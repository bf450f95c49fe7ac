"""VisionZip by hand."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from views import view_of

from strategy import Facts, VTRConfig, registry
from strategy.base import EncoderView
from strategy.visionzip import targets


def make():
    return registry.get("visionzip")(VTRConfig(strategy="visionzip"))


def seen(attention, keys, keep, features=None):
    """A view of what the tower saw: attention [heads, N], keys [heads, N, width], features [N, C]."""
    features = torch.zeros(attention.shape[1], 2) if features is None else features
    encoder = EncoderView(attention[None], keys[None], features[None])
    return view_of(features[None], torch.zeros(1, 1, 1, attention.shape[1]), keep=keep, encoder=encoder)


@pytest.mark.parametrize(("keep", "contextual"), [(64, 10), (128, 20), (192, 30), (7, 1), (6, 0)])
def test_ten_of_64_are_contextual(keep, contextual):
    attention = torch.linspace(1, 0, 576)[None]
    kept = make().select(seen(attention, torch.zeros(1, 576, 2), keep))[0]
    assert kept[: keep - contextual].tolist() == list(range(keep - contextual))
    steps = kept[keep - contextual :].diff()
    assert len(kept) == keep
    assert (steps == (576 - keep + contextual) // contextual).all() if contextual else not len(steps)


def test_targets_stand_at_even_steps_from_the_first_on():
    rest = torch.tensor([[2, 3, 5, 7, 11, 13, 17]])
    assert targets(rest, 3).tolist() == [[2, 5, 11]]
    assert targets(rest, 1).tolist() == [[2]]
    assert targets(rest, 7).tolist() == rest.tolist()


def test_the_mean_over_heads_names_the_dominant_tokens():
    # Means 0.2 0.3 0.25 0.25: the second, then the first of the two equal ones.
    attention = torch.tensor([[0.4, 0.1, 0.3, 0.2], [0.0, 0.5, 0.2, 0.3]])
    assert make().select(seen(attention, torch.zeros(2, 4, 2), 2)).tolist() == [[1, 2]]


def test_what_is_left_is_averaged_into_the_target_whose_keys_it_is_like():
    # Of 14 kept of 20, two are contextual. The first twelve are dominant, so 12 ... 19 are left, and 12 and 16 the
    # targets, with keys along x and y in the mean over heads. 13 and 14 are like 12; 15, 17 and 18 like 16; 19 is as
    # like both, and so goes to the first.
    attention, keys = torch.linspace(1, 0, 20)[None].repeat(2, 1), torch.zeros(2, 20, 2)
    keys[:, [12, 13, 14]] = torch.tensor([2.0, 0])
    keys[:, [15, 16, 17, 18]] = torch.tensor([0.0, 3])
    keys[:, 19] = 1.0
    keys[:, 13] += torch.tensor([[0.0, 9], [0, -9]])  # which the mean over heads takes away
    features = torch.arange(20.0)[:, None].repeat(1, 2)
    strategy, view = make(), seen(attention, keys, 14, features)
    kept = strategy.select(view)
    assert kept.tolist() == [[*range(13), 16]]
    merged = (strategy.merge(view, kept) @ view.features)[0, :, 0]
    assert merged[:12].tolist() == list(range(12))
    torch.testing.assert_close(merged[12:], torch.tensor([(12 + (13 + 14 + 19) / 3) / 2, (16 + 50 / 3) / 2]))
    assert not view.memo


@given(seed=st.integers(0, 10**6), count=st.integers(2, 80), data=st.data())
def test_every_kept_token_is_a_mean_and_every_other_one_is_in_one(seed, count, data):
    keep, generator = data.draw(st.integers(1, count - 1)), torch.Generator().manual_seed(seed)
    view = seen(torch.rand(2, count, generator=generator), torch.randn(2, count, 3, generator=generator), keep)
    strategy = make()
    kept = strategy.select(view)
    assert (kept.diff(dim=1) > 0).all()
    assert kept.shape == (1, keep)
    weights = strategy.merge(view, kept)
    assert (weights is None) == (keep < 7)
    if weights is not None:
        torch.testing.assert_close(weights.sum(-1), torch.ones(1, keep))
        assert ((weights > 0).sum(1) == 1).all()
        assert (weights.take_along_dim(kept[..., None], 2) >= 0.5).all()


def test_a_later_stage_needs_no_grid_and_the_default_is_192_tokens_before_the_first_layer():
    plan = make().plan(Facts(depth=32, nominal_tokens=576))
    assert (plan.layers, plan.kept(576)) == ((0,), (192,))
