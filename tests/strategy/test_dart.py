"""DART by hand, and beside its rule in plain Python."""

import math

import torch
from hypothesis import given
from hypothesis import strategies as st
from views import view_of

from strategy import VTRConfig, registry
from strategy.dart import largest, least_alike


def make(**knobs):
    return registry.get("dart")(VTRConfig(strategy="dart", **knobs))


def test_the_largest_are_found_in_order_and_padding_is_not():
    norms = torch.tensor([[3.0, 9, 9, 1, 7], [3.0, 9, 9, 1, 7]])
    real = torch.tensor([[True] * 5, [True, False, False, True, False]])
    assert largest(norms, 2, real).tolist() == [[1, 2], [0, 3]]
    assert largest(norms, 4, real).tolist() == [[0, 1, 2, 4], [0, 0, 3, 3]]


def at_angles(*degrees):
    """Tokens [1, N, 2] at angles, with different lengths, which do not count."""
    angles = torch.tensor(degrees, dtype=torch.float32).deg2rad()
    return (torch.stack([angles.cos(), angles.sin()], dim=1) * torch.arange(1, len(degrees) + 1)[:, None])[None]


def test_pivots_take_turns_and_each_takes_what_is_least_like_it():
    # The pivots stand at 0 and 90 degrees. Of 3, the first takes 2: those at 170 and 100, and the second 30, not 80.
    tokens, none = at_angles(30, 100, 170, 80), torch.zeros(1, 4, dtype=torch.bool)
    assert least_alike(tokens, at_angles(0, 90), none, 3).tolist() == [[True, True, True, False]]
    assert least_alike(tokens, at_angles(0, 90), none, 1).tolist() == [[False, False, True, False]]
    taken = torch.tensor([[False, False, True, False]])
    assert least_alike(tokens, at_angles(0, 90), taken, 1).tolist() == [[False, True, True, False]]


def test_the_keys_name_the_pivots_and_the_features_the_rest():
    # L1 norms over heads and widths are 3 1 2 4: token 3 is the visual pivot, the first word the other one. Token 3,
    # at 0 degrees, takes 2, at 180; the word, at 180, takes 0, at 10, not 1, at 60.
    features, words = at_angles(10, 60, 180, 0), at_angles(180, 0)
    keys = torch.tensor([[[1.0, -1], [0, 0.5], [1, 0], [2, 2]], [[0, 1], [0.5, 0], [0, -1], [0, 0]]])[None]
    word_keys = torch.tensor([[[1.0, 1], [0.1, 0]], [[0, 0], [0, 0.1]]])[None]
    view = view_of(features, torch.zeros(1, 1, 2, 4), keep=3, words=words, keys=torch.cat([keys, word_keys], dim=2))
    assert make(pivot_image_token=1, pivot_text_token=1).select(view).tolist() == [[0, 2, 3]]


def test_fewer_tokens_than_pivots_are_those_with_the_largest_norms():
    keys = torch.tensor([5.0, 1, 7, 6, 0]).view(1, 1, 5, 1)
    view = view_of(torch.randn(1, 4, 3), torch.zeros(1, 1, 1, 4), keep=2, keys=keys)
    assert make().select(view).tolist() == [[2, 3]]


@given(seed=st.integers(0, 10**6), count=st.integers(2, 30), words=st.integers(1, 6), data=st.data())
def test_the_choice_is_that_of_the_rule(seed, count, words, data):
    keep, padding = data.draw(st.integers(1, count - 1)), data.draw(st.integers(0, words - 1))
    generator = torch.Generator().manual_seed(seed)
    features, text = (torch.randn(1, length, 5, generator=generator) for length in (count, words))
    keys = torch.randn(1, 2, count + words, 3, generator=generator)
    asked = (torch.arange(words) >= padding)[None]
    attention = torch.zeros(1, 1, words, count)
    view = view_of(features, attention, keep=keep, words=text, asked=asked, keys=keys)
    norm = keys[0].abs().sum((0, 2)).tolist()
    state = [*features[0].double().tolist(), *text[0].double().tolist()]

    def cosine(a, b):
        dot = sum(x * y for x, y in zip(state[a], state[b], strict=True))
        return dot / math.hypot(*state[a]) / math.hypot(*state[b])

    own = sorted(sorted(range(count), key=lambda at: -norm[at])[: min(4, keep)])
    real = sorted(range(count + padding, count + words), key=lambda at: -norm[at])[:4]
    others = sorted(real[turn % len(real)] for turn in range(4))
    kept, pivots = set(own), own + others
    rest = keep - len(own)
    for number, pivot in enumerate(pivots):
        share = rest // len(pivots) + (number < rest % len(pivots))
        left = sorted(set(range(count)) - kept, key=lambda at: cosine(pivot, at))
        kept |= set(left[:share])
    assert make().select(view).tolist() == [sorted(kept)]
