"""ApET by hand, and its error beside least squares."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from views import view_of

from strategy import Facts, VTRConfig, registry
from strategy.apet import approximation_error


def make(**knobs):
    return registry.get("apet")(VTRConfig(strategy="apet", **knobs))


def farthest_points(tokens, count):
    """Indices of farthest point sampling that begins at the first token, in plain Python."""
    rows, chosen = tokens.tolist(), [0]

    def distance(a, b):
        return sum((x - y) ** 2 for x, y in zip(rows[a], rows[b], strict=True)) ** 0.5

    while len(chosen) < count:
        nearest = [min(distance(at, one) for one in chosen) for at in range(len(rows))]
        chosen.append(max(range(len(rows)), key=lambda at: nearest[at]))
    return chosen


def test_the_error_is_the_distance_from_the_span_of_the_basis():
    # The basis is the first token and the farthest from it, the fourth: the plane of x and y. Heights are 0 3 0.5 0 2.
    features = torch.tensor([[[1.0, 0, 0], [2, 0, 3], [1, 1, -0.5], [0, 9, 0], [0, 5, 2]]])
    torch.testing.assert_close(approximation_error(features, 2), torch.tensor([[0, 3, 0.5, 0, 2]]))
    # With the first alone, the line of x.
    torch.testing.assert_close(approximation_error(features, 1), torch.tensor([[0, 3, 1.25**0.5, 9, 29**0.5]]))
    view = view_of(features, torch.zeros(1, 1, 1, 5), keep=2)
    assert make(basis_token_num=2).select(view).tolist() == [[1, 4]]


@given(seed=st.integers(0, 10**6), count=st.integers(1, 20), width=st.integers(1, 24), basis=st.integers(1, 6))
def test_the_error_is_that_of_least_squares(seed, count, width, basis):
    tokens = torch.randn(2, count, width, generator=torch.Generator().manual_seed(seed))
    error = approximation_error(tokens, basis)
    for own, found in zip(tokens.double(), error, strict=True):
        chosen = own[sorted(set(farthest_points(own, min(basis, count))))]
        solved = torch.linalg.lstsq(chosen.T, own.T, driver="gelsd").solution
        torch.testing.assert_close((own - solved.T @ chosen).norm(dim=-1).float(), found, rtol=0, atol=1e-3)


@pytest.mark.parametrize("tokens", [torch.zeros(1, 6, 3), torch.ones(1, 6, 3), torch.eye(3).repeat(1, 2, 1)])
def test_copies_of_the_basis_have_no_error(tokens):
    assert not approximation_error(tokens, 10).any()


def test_rounding_does_not_choose_among_tokens_that_the_basis_spans():
    tokens = torch.randn(1, 20, 4, generator=torch.Generator().manual_seed(0))
    assert not approximation_error(tokens, 6).any()
    assert make(basis_token_num=6).select(view_of(tokens, torch.zeros(1, 1, 1, 20), keep=3)).tolist() == [[0, 1, 2]]


def test_what_is_dropped_is_averaged_into_the_kept_token_most_like_it():
    # Kept are 1 (x) and 3 (y). The first is like 1, the third like 3, the last as like both, so the first of the two.
    features = torch.tensor([[[1.0, 0.1], [4, 0], [0.1, 1], [0, 6], [1, 1]]])
    view = view_of(features, torch.zeros(1, 1, 1, 5), keep=2)
    weights = make().merge(view, torch.tensor([[1, 3]]))
    third = 1 / 3
    torch.testing.assert_close(weights, torch.tensor([[[third, third, 0, 0, third], [0, 0, 0.5, 0.5, 0]]]))


def test_a_kept_token_stays_its_own_also_where_another_points_the_same_way():
    features = torch.tensor([[[1.0, 0], [2, 0], [0, 1]]])
    weights = make().merge(view_of(features, torch.zeros(1, 1, 1, 3), keep=2), torch.tensor([[0, 1]]))
    assert weights[0, 1].tolist() == [0, 1, 0]


def test_the_mean_layer_has_the_budget():
    plan = make(keep_tokens=64).plan(Facts(depth=32, nominal_tokens=576))
    assert (plan.layers, plan.kept(576)) == ((0, 16), (96, 32))
