"""MMTok by hand."""

import math

import torch
from views import view_of

from strategy import VTRConfig, registry
from strategy.base import EncoderView
from strategy.mmtok import shares


def kept(keep, features, seen, words, asked=None):
    """What is kept of tokens with projected features [N, C] that the tower saw as `seen` [N, D], for words [R, C]."""
    count = len(features)
    encoder = EncoderView(torch.zeros(1, 1, count), torch.zeros(1, 1, count, 2), seen[None])
    attention = torch.zeros(1, 1, len(words), count)
    asked = torch.ones(1, len(words), dtype=torch.bool) if asked is None else asked
    view = view_of(features[None], attention, keep=keep, words=words[None], asked=asked, encoder=encoder)
    return registry.get("mmtok")(VTRConfig(strategy="mmtok")).select(view)[0].tolist()


def test_shares_are_a_softmax_over_the_tokens_whatever_their_length():
    # Cosines 1 and 0.6, and 0 and 0.8.
    targets, tokens = torch.tensor([[[2.0, 0], [0, 9]]]), torch.tensor([[[5.0, 0], [3, 4]]])
    first, second = math.exp(1 / 0.5), math.exp(0.6 / 0.5)
    third = math.exp(0.8 / 0.5)
    expected = [[first / (first + second), second / (first + second)], [1 / (1 + third), third / (1 + third)]]
    torch.testing.assert_close(shares(targets, tokens, 0.5), torch.tensor([expected]))


def test_a_word_is_covered_by_projected_features_and_the_picture_by_those_of_the_tower():
    # The word is token 1's. To the tower, 0 and 1 are alike, and 2, which covers itself, is alone.
    features, seen = torch.eye(3), torch.tensor([[1.0, 0], [1, 0], [0, 1]])
    assert kept(1, features, seen, features[1:2]) == [1]
    assert kept(2, features, seen, features[1:2]) == [1, 2]
    # Two words, of 0 and 1: they weigh more than all of the picture.
    assert kept(2, features, seen, features[:2]) == [0, 1]


def test_padding_is_no_word():
    features, seen = torch.eye(3), torch.tensor([[1.0, 0], [1, 0], [0, 1]])
    words = features[[0, 1]]
    assert kept(2, features, seen, words, torch.tensor([[False, True]])) == [1, 2]
    assert kept(2, features, seen, words, torch.tensor([[True, False]])) == [0, 2]


def test_the_picture_counts_half_of_the_words():
    # Token 0 covers the one word by softmax(1, 0, 0), and no word is covered by 1 and 2, which are alike to the tower.
    features = torch.tensor([[1.0, 0], [0, 1], [0, 1]])
    seen = torch.tensor([[1.0, 0], [0, 1], [0, 1]])
    assert kept(1, features, seen, torch.tensor([[1.0, 0]])) == [0]
    # Of a word that all tokens cover alike, a third is covered by each: the picture decides, and 1 covers more of it.
    assert kept(1, features, seen, torch.tensor([[1.0, 1]])) == [1]
