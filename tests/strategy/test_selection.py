"""Which tokens stay: ties, order, and the two ways to find the highest scores."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from strategy.kernels import selection


def rows(draw, length):
    return [draw(st.lists(st.integers(-3, 3), min_size=length, max_size=length)) for _ in range(2)]


@st.composite
def scored(draw):
    length = draw(st.integers(1, 30))
    return torch.tensor(rows(draw, length), dtype=torch.float32), draw(st.integers(1, length))


@given(scored())
def test_the_highest_stay_and_of_equal_ones_the_first(given):
    scores, count = given
    wanted = [sorted(sorted(range(len(row)), key=lambda at: -row[at])[:count]) for row in scores.tolist()]
    assert selection.select_top(scores, count).tolist() == wanted


@given(scored())
def test_all_pairs_tell_the_same_as_a_sort(given):
    scores, count = given
    assert torch.equal(selection.select_top_by_pairs(scores, count), selection.select_top(scores, count))


@st.composite
def sequences(draw):
    """For two samples which of the tokens left are visual ones, equally many, and which of these are chosen."""
    visual, text, chosen = draw(st.integers(1, 12)), draw(st.integers(1, 6)), draw(st.integers(1, 12))
    kinds = [draw(st.permutations([True] * visual + [False] * text)) for _ in range(2)]
    picks = [sorted(draw(st.permutations(range(visual)))[: min(chosen, visual)]) for _ in range(2)]
    return torch.tensor(kinds), torch.tensor(picks)


@given(sequences())
def test_what_stays_is_all_text_and_the_chosen_in_order(given):
    kinds, picks = given
    samples, length = kinds.shape
    left = torch.arange(length).expand(samples, -1) * 3  # of a prompt that lost some before
    visual, text = (torch.stack([row.nonzero().flatten() for row in mask]) for mask in (kinds, ~kinds))
    number = torch.arange(visual.shape[1]).expand(samples, -1) * 2
    stay, left_now, number_now, visual_now, text_now = selection.keep_chosen(left, number, visual, text, picks)
    for row in range(samples):
        chosen = visual[row, picks[row]].tolist()
        wanted = sorted(chosen + text[row].tolist())
        assert stay[row].tolist() == wanted
        assert left_now[row].tolist() == [3 * at for at in wanted]
        assert number_now[row].tolist() == [2 * at for at in picks[row].tolist()]
        assert visual_now[row].tolist() == [wanted.index(at) for at in chosen]
        assert text_now[row].tolist() == [wanted.index(at) for at in text[row].tolist()]


@given(scored())
def test_the_first_of_the_greatest_is_found(given):
    scores, _ = given
    wanted = [[row.index(max(row))] for row in scores.tolist()]
    assert selection.first_maximum(scores).tolist() == wanted


@given(st.lists(st.integers(-1, 4), min_size=1, max_size=4))
def test_a_selection_names_different_tokens_in_order(row):
    right = row == sorted(set(row)) and set(row) <= set(range(4))
    assert bool(selection.is_selection(torch.tensor([[0, 1, 2, 3][: len(row)], row]), 4)) == right


@given(seed=st.integers(0, 10**6), count=st.integers(1, 15), number=st.integers(1, 4))
def test_each_group_keeps_its_best(seed, count, number):
    generator = torch.Generator().manual_seed(seed)
    scores, group, shares = (
        torch.randint(0, high, (2, size), generator=generator)
        for high, size in ((4, count), (number, count), (5, number))
    )
    found = selection.best_of_groups(scores.float(), group, shares).tolist()
    for mask, worth, home, share in zip(found, scores.tolist(), group.tolist(), shares.tolist(), strict=True):
        for each in range(number):
            own = sorted((at for at in range(count) if home[at] == each), key=lambda at: -worth[at])
            assert [at for at in own if mask[at]] == own[: share[each]]


def test_what_a_group_has_no_room_for_goes_to_the_next_ones_that_have_some():
    wanted, room = torch.tensor([[4, 1, 0]]), torch.tensor([[2, 2, 9]])
    assert selection.share_out(wanted, room, torch.tensor([[0, 1, 2]]), 5).tolist() == [[2, 2, 1]]
    assert selection.share_out(wanted, room, torch.tensor([[2, 1, 0]]), 5).tolist() == [[2, 1, 2]]
    assert selection.share_out(wanted, room + 9, torch.tensor([[0, 1, 2]]), 5).tolist() == [[4, 1, 0]]
