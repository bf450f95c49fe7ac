"""HoloV by hand."""

import torch
from hypothesis import given
from hypothesis import strategies as st
from views import view_of

from strategy import VTRConfig, registry
from strategy.base import EncoderView
from strategy.holov import crops, holistic_score


def select(attention, keep, features=None):
    """What is kept of tokens with attention [heads, N] and projected features [N, C], which are alike by default."""
    features = torch.ones(attention.shape[1], 2) if features is None else features
    encoder = EncoderView(attention[None], torch.zeros(1, *attention.shape, 2), torch.zeros(1, len(features), 2))
    view = view_of(features[None], torch.zeros(1, 1, 1, len(features)), keep=keep, encoder=encoder)
    return registry.get("holov")(VTRConfig(strategy="holov")).select(view)[0].tolist()


def paid(count, **by_token):
    attention = torch.zeros(2, count)
    for name, value in by_token.items():
        attention[:, int(name[1:])] = torch.tensor([0.5, 1.5]) * value
    return attention


def test_crops_are_slices_of_which_the_first_may_be_longer():
    assert crops(7, 3, torch.device("cpu")).tolist() == [0, 0, 0, 1, 1, 2, 2]
    assert crops(576, 16, torch.device("cpu")).bincount().tolist() == [36] * 16
    assert crops(3, 3, torch.device("cpu")).tolist() == [0, 1, 2]


def test_a_score_is_attention_and_the_variance_of_likeness_inside_the_crop():
    # Cosines to the others are 1 0, 1 0 and 0 0, with variances 1/4 1/4 0, mean 1/6. The attention's mean is 0.2, so
    # that variances count 0.09 * 0.2 * 6 times. The last token is alone in its crop, whatever it is like.
    features = torch.tensor([[[1.0, 0], [7, 0], [0, 1], [1, 0]]])
    attention, crop = torch.tensor([[0.2, 0.1, 0.3, 0.4]]), torch.tensor([0, 0, 0, 1])
    expected = torch.tensor([[0.2 + 0.027, 0.1 + 0.027, 0.3, 0.4]])
    torch.testing.assert_close(holistic_score(features, attention, crop), expected, rtol=0, atol=1e-5)


def test_attended_crops_keep_more_and_what_they_have_no_room_for_goes_on():
    # Sixteen crops of two. The crop of 6 and 7 is paid 0.4 on average and that of 20 and 21 0.1: of five tokens four
    # and one. The first has room for two, so that the other keeps both of its tokens and the first crop of all one.
    attention = paid(32, t6=0.5, t7=0.3, t20=0.2)
    assert select(attention, 5) == [0, 6, 7, 20, 21]
    # 2.4 and 0.6 of three: the one that is left over goes to the crop that is paid most, and from there on.
    assert select(attention, 3) == [6, 7, 20]


def test_every_crop_keeps_the_same_of_a_picture_that_is_paid_evenly():
    assert select(torch.full((4, 576), 1 / 576), 64) == [36 * crop + at for crop in range(16) for at in range(4)]
    assert select(torch.zeros(1, 32), 20) == [0, 1, 2, 3, 4, 5, 6, 7, *range(8, 32, 2)]


def test_inside_a_crop_the_variance_decides_between_equally_paid_tokens():
    # Of the first crop of three, the first two differ from each other less than from the third.
    features, attention = torch.ones(48, 2), torch.full((1, 48), 0.1)
    features[0], features[1], features[2] = torch.tensor([0.0, 1]), torch.tensor([1.0, 0]), torch.tensor([1.0, 0])
    assert select(attention, 16, features)[0] == 1


@given(seed=st.integers(0, 10**6), count=st.integers(2, 60), data=st.data())
def test_exactly_the_budget_is_kept(seed, count, data):
    keep, generator = data.draw(st.integers(1, count - 1)), torch.Generator().manual_seed(seed)
    attention = torch.rand(2, count, generator=generator) ** data.draw(st.sampled_from([1, 20]))
    kept = select(attention, keep, torch.randn(count, 3, generator=generator))
    assert len(set(kept)) == keep
    assert kept == sorted(kept)
    assert set(kept) <= set(range(count))
