"""PruneSID by hand, and its parts against plain ways to compute them."""

import torch
from hypothesis import given
from hypothesis import strategies as st
from views import view_of

from strategy import VTRConfig, registry
from strategy.base import EncoderView
from strategy.prunesid import quotas, suppressed


def select(features, attention, keep):
    """What is kept of tokens with features [N, C] and attention [heads, N] in the tower."""
    encoder = EncoderView(attention[None], torch.zeros(1, *attention.shape, 2), features[None])
    view = view_of(torch.zeros(1, len(features), 2), torch.zeros(1, 1, 1, len(features)), keep=keep, encoder=encoder)
    return registry.get("prunesid")(VTRConfig(strategy="prunesid")).select(view)[0].tolist()


def test_a_token_suppresses_worse_ones_unless_it_is_suppressed_itself():
    # Best first 2 0 1 3. 2 suppresses 0, which then leaves 1 alone, and 1 suppresses 3.
    alike = torch.zeros(1, 4, 4, dtype=torch.bool)
    for one, other in [(2, 0), (0, 1), (1, 3)]:
        alike[0, one, other] = alike[0, other, one] = True
    assert suppressed(alike, torch.tensor([[2, 0, 1, 3]])).tolist() == [[True, False, False, True]]


@given(seed=st.integers(0, 10**6), count=st.integers(1, 12))
def test_that_is_so_for_all_likenesses(seed, count):
    generator = torch.Generator().manual_seed(seed)
    alike = torch.rand(2, count, count, generator=generator) < 0.3
    alike = (alike | alike.transpose(1, 2)) & ~torch.eye(count, dtype=torch.bool)
    order = torch.rand(2, count, generator=generator).argsort(1)
    for gone, like, tokens in zip(suppressed(alike, order).tolist(), alike.tolist(), order.tolist(), strict=True):
        kept = []
        for token in tokens:
            if not any(like[token][other] for other in kept):
                kept.append(token)
        assert [at for at, out in enumerate(gone) if not out] == sorted(kept)


def test_each_group_keeps_one_and_then_as_many_as_its_distinct_tokens_allow():
    # Of six: one for each of three groups; 1/6, 4/6 and 1/6 of three are rounded, in sum, to 1, 2 and 0. The first
    # group has one distinct token only, so that the one it has no room for goes to the group with most.
    size, distinct = torch.tensor([[3, 5, 0, 2]]), torch.tensor([[1, 4, 0, 1]])
    assert quotas(size, distinct, 6).tolist() == [[1, 4, 0, 1]]
    # Of eight, the distinct ones are two too few: each group may keep one more; 5/6, 20/6 and 5/6 are 1, 3 and 1.
    assert quotas(size, distinct, 8).tolist() == [[2, 4, 0, 2]]
    # Five for each 64 at most, and more where that is not enough.
    assert quotas(torch.tensor([[20, 4]]), torch.tensor([[20, 4]]), 9).tolist() == [[5, 4]]
    assert quotas(torch.tensor([[20, 4]]), torch.tensor([[20, 4]]), 12).tolist() == [[8, 4]]


def test_what_differs_comes_before_what_is_attended():
    # One group of 4 kept. Three tokens along x are alike, of which the second is paid most; then come 4 and 3, which
    # are like none, and at last the best of what is suppressed.
    features = torch.tensor([[4.0, 0, 0], [4, 0, 0], [4, 0, 0], [0, 4, 0], [0, 0, 4]])
    attention = torch.tensor([[0.1, 0.2, 0.2, 0.0, 0.02], [0.0, 0.1, 0.0, 0.01, 0.0]])
    assert select(features, attention, 4) == [1, 2, 3, 4]
    assert select(features, attention, 3) == [1, 3, 4]


def test_every_component_keeps_a_token():
    # Two kinds of tokens, and all attention is paid to the first.
    features = torch.cat([torch.tensor([[3.0, -3, 0, 0]]).repeat(8, 1), torch.tensor([[0, 0, 3.0, -3]]).repeat(4, 1)])
    attention = torch.linspace(1, 0, 12)[None]
    kept = select(features, attention, 8)
    assert len(kept) == 8
    assert {0, 8} <= set(kept)


@given(seed=st.integers(0, 10**6), count=st.integers(2, 40), data=st.data())
def test_exactly_the_budget_is_kept(seed, count, data):
    keep, generator = data.draw(st.integers(1, count - 1)), torch.Generator().manual_seed(seed)
    features = torch.randn(count, data.draw(st.integers(1, 8)), generator=generator)
    kept = select(features, torch.rand(2, count, generator=generator), keep)
    assert len(set(kept)) == keep
    assert kept == sorted(kept)
    assert set(kept) <= set(range(count))
