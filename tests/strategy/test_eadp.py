"""EADP by hand, and its parts against plain ways to compute them."""

import math

import pytest
import torch
from torch.nn.functional import conv2d, pad
from views import view_of

from strategy import VTRConfig, registry
from strategy.eadp import dense_likeness, smooth


def make():
    return registry.get("eadp")(VTRConfig(strategy="eadp"))


def seen(features, words, keep=1, grids=None, asked=None, **more):
    attention = torch.zeros(1, 1, len(words), len(features))
    asked = None if asked is None else asked[None]
    return view_of(features[None], attention, grids, keep=keep, words=words[None], asked=asked, **more)


def test_the_word_with_the_clearest_place_counts():
    # Of five words one stays: the third, which is like one token and not like the others.
    likeness = torch.tensor([[[0.1, 0.1, 0.1], [0.2, 0.2, 0.19], [0.5, 0.0, 0.1], [0.3, 0.3, 0.3], [0.0, 0.0, 0.0]]])
    asked = torch.ones(1, 5, dtype=torch.bool)
    torch.testing.assert_close(dense_likeness(likeness, asked), likeness[:, 2])
    # At padding there is no word, and of fewer than five one stays, too.
    asked[:, 2] = False
    torch.testing.assert_close(dense_likeness(likeness, asked), likeness[:, 1])


def test_of_ten_words_two_stay_weighted_by_entropy():
    likeness = torch.zeros(1, 10, 2)
    likeness[0, 4], likeness[0, 7] = torch.tensor([0.0, 0.005]), torch.tensor([0.01, 0.0])

    def entropy(gap):
        share = 1 / (1 + math.exp(-gap))
        return -share * math.log(share) - (1 - share) * math.log(1 - share)

    # With a factor of 100, the two differ by 0.5 and by 1.
    odds = math.exp((entropy(0.5) - entropy(1)) / 0.01)
    expected = torch.tensor([[0.01 * odds / (1 + odds), 0.005 / (1 + odds)]])
    found = dense_likeness(likeness, torch.ones(1, 10, dtype=torch.bool))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("grid", [(1, 4, 6), (3, 2, 5)])
def test_smoothing_is_a_convolution_of_each_frame(grid):
    values = torch.rand(2, *grid, generator=torch.Generator().manual_seed(0))
    at = torch.arange(-1.0, 2)
    kernel = (-(at[:, None] ** 2 + at**2) / 2).exp()
    kernel = (kernel / kernel.sum())[None, None]
    frames = values.flatten(0, 1)[:, None]
    expected = conv2d(pad(frames, (1, 1, 1, 1), mode="reflect"), kernel).view_as(values)
    torch.testing.assert_close(smooth(values), expected)


def test_what_is_least_like_the_question_is_important_and_its_grid_spreads_it():
    # The cosines with the one word are 1, 0, 0 and -1. Negative and scaled to 0 ... 1 that is 0, 1/2, 1/2 and 1.
    features, words = torch.tensor([[2.0, 0], [0, 1], [0, 3], [-1, 0]]), torch.tensor([[5.0, 0]])
    unit = torch.nn.functional.normalize(features, dim=-1)[None]
    found = make().importance(seen(features, words), unit)
    torch.testing.assert_close(found, torch.tensor([[0, 0.25, 0.25, 1]]), rtol=0, atol=1e-5)
    # On 2 x 2 tokens, mirroring shows each its three neighbours: opposite ones twice each side, with e^-1/2 and e^-1.
    near, far = 2 * math.exp(-0.5), 4 * math.exp(-1)
    whole = 1 + 2 * near + far
    expected = [(near + far) / whole, (0.5 + near + 0.5 * far) / whole] * 2
    expected = torch.tensor([[expected[0], expected[1], expected[1], (1 + near) / whole]]).square()
    found = make().importance(seen(features, words, grids=((1, 2, 2),)), unit)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    later = make().importance(seen(features, words, grids=((1, 2, 2),), stage=1), unit)
    torch.testing.assert_close(later, torch.tensor([[0, 0.25, 0.25, 1]]), rtol=0, atol=1e-5)


def test_tokens_are_chosen_that_cover_the_important_ones():
    # Importance 0, 1/4, 1/4, 1, as above: tokens cover opposite ones not at all and others by half. The last token
    # covers 1/8 + 1/8 + 1 of it, the middle ones 1/4 + 1/4 + 1/2. Then one of these adds 1/8 + 1/8.
    features, words = torch.tensor([[2.0, 0], [0, 1], [0, 3], [-1, 0]]), torch.tensor([[5.0, 0]])
    assert make().select(seen(features, words, keep=1)).tolist() == [[3]]
    assert make().select(seen(features, words, keep=2)).tolist() == [[1, 3]]


def test_padding_is_no_word():
    features = torch.randn(6, 3, generator=torch.Generator().manual_seed(0))
    words = torch.randn(4, 3, generator=torch.Generator().manual_seed(1))
    asked = torch.tensor([True, True, False, False])
    own = make().importance(seen(features, words[:2]), features[None])
    torch.testing.assert_close(make().importance(seen(features, words, asked=asked), features[None]), own)
