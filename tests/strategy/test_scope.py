"""SCOPE by hand, and its greedy choice in plain Python."""

import itertools

import torch
from hypothesis import given
from hypothesis import strategies as st
from views import view_of

from strategy import VTRConfig, registry
from strategy.base import EncoderView
from strategy.kernels.selection import greedy_coverage


def test_each_token_adds_what_the_chosen_do_not_cover_times_its_weight():
    # Coverage alone: token 1 covers 0.8 1 0.8 0 and so 2.6, more than any other. Then 0 adds 0.2, 2 adds 0.2, 3 adds 1.
    likeness = torch.tensor([[[1, 0.8, 0.5, 0], [0.8, 1, 0.8, 0], [0.5, 0.8, 1, 0], [0, 0, 0, 1.0]]])
    assert greedy_coverage(likeness, torch.ones(1, 4), 4).tolist() == [[1, 3, 0, 2]]
    # With these weights they are worth 2.3 * 2, 2.6, 2.3 * 0.5 and 1 * 0.05. Then 1 adds 0.2 + 0.3, 2 adds 0.3 + 0.5,
    # half of it counted, and 3 adds 0.05. At last 2 adds 0.2 * 0.5.
    weight = torch.tensor([[2.0, 1, 0.5, 0.05]])
    assert greedy_coverage(likeness, weight, 3).tolist() == [[0, 1, 2]]


def test_what_is_negative_covers_nothing_and_the_first_of_equals_is_taken():
    likeness = torch.tensor([[[1.0, -1, 0], [-1, 1, 0], [0, 0, 1]]])
    assert greedy_coverage(likeness, torch.ones(1, 3), 3).tolist() == [[0, 1, 2]]
    assert greedy_coverage(torch.ones(1, 4, 4), torch.ones(1, 4), 3).tolist() == [[0, 1, 2]]
    assert greedy_coverage(torch.ones(1, 4, 4), torch.tensor([[0.0, 0, 3, 0]]), 2).tolist() == [[2, 0]]


@given(seed=st.integers(0, 10**6), count=st.integers(1, 12), data=st.data())
def test_the_choice_is_that_of_the_rule(seed, count, data):
    keep, generator = data.draw(st.integers(1, count)), torch.Generator().manual_seed(seed)
    tokens = torch.randn(2, count, 4, generator=generator).double()
    likeness, weight = tokens @ tokens.transpose(1, 2), torch.rand(2, count, generator=generator).double()
    chosen = greedy_coverage(likeness, weight, keep).tolist()
    for like, worth, found in zip(likeness.tolist(), weight.tolist(), chosen, strict=True):

        def coverage(which, like=like):
            return sum(max([0, *(like[one][at] for one in which)]) for at in range(len(like)))

        assert len(set(found)) == keep
        for step, token in enumerate(found):
            left = [at for at in range(count) if at not in found[:step]]
            gain = {at: (coverage([*found[:step], at]) - coverage(found[:step])) * worth[at] for at in left}
            assert gain[token] >= max(gain.values()) - 1e-9


def test_with_equal_weights_it_is_within_the_bound_of_the_best_set():
    tokens = torch.randn(1, 8, 3, generator=torch.Generator().manual_seed(0))
    likeness = (tokens @ tokens.transpose(1, 2)).clamp(min=0)[0]
    values = {which: likeness[list(which)].amax(0).sum().item() for which in itertools.combinations(range(8), 3)}
    found = tuple(sorted(greedy_coverage(likeness[None], torch.ones(1, 8), 3)[0].tolist()))
    assert values[found] >= (1 - 1 / 2.71828) * max(values.values())


def test_the_strategy_weighs_the_cosine_of_features_by_the_attention_of_all_heads():
    # Two kinds, along x and y, whatever their length; of each the one that is paid most: 0.4 and 0.3.
    features = torch.tensor([[[1.0, 0], [9, 0], [0, 2], [0, 1]]])
    attention = torch.tensor([[[0.1, 0.3, 0.0, 0.2], [0.0, 0.1, 0.2, 0.1]]])
    encoder = EncoderView(attention, features[:, None], features)
    view = view_of(torch.zeros(1, 4, 2), torch.zeros(1, 1, 1, 4), keep=2, encoder=encoder)
    assert registry.get("scope")(VTRConfig(strategy="scope")).select(view).tolist() == [[1, 3]]
