"""Which graphs are kept when memory is short; how they are captured needs a GPU, see `gpu_checks`."""

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from strategy.graphs import WORTH, Graph, Graphs, reason


def come(graphs: Graphs, key: str, own: int, growth: int, uses: int = 1) -> bool:
    """Let a program come as `run` does, with the bytes that are its own and those by which what all share grows."""
    if key in graphs.never:
        return False
    if key not in graphs.kept:
        if not graphs.kept:
            graphs.shared = 0
        graphs.shared += growth
        nothing: Any = None
        graphs._keep(key, Graph(nothing, print, (), None, own))
    if key in graphs.kept:
        graphs.kept.move_to_end(key)
        graphs.kept[key].uses += uses
    return key in graphs.kept


def test_what_is_too_large_alone_is_told_by_itself_and_bans_no_other():
    graphs = Graphs(torch.device("cpu"), limit=100)
    for _ in range(3):
        assert come(graphs, "decode", 20, 5)
        assert come(graphs, "prefill", 5, 10)
        assert not come(graphs, "big", 90, 60)
    assert graphs.never == {"big"}


def test_what_had_to_go_twice_before_it_was_of_use_is_not_captured_again():
    graphs = Graphs(torch.device("cpu"), limit=100)
    for turn in range(4):
        assert come(graphs, "one", 60, 0) == (turn < 2)
        assert come(graphs, "other", 60, 0)
    assert graphs.never == {"one"}


def test_what_was_of_use_may_come_again():
    graphs = Graphs(torch.device("cpu"), limit=100)
    for _ in range(9):
        assert come(graphs, "one", 60, 0, uses=WORTH)
        assert come(graphs, "other", 60, 0, uses=WORTH)
    assert not graphs.never


@given(st.lists(st.tuples(st.sampled_from("abcdef"), st.integers(0, 120), st.integers(0, 120), st.integers(0, 9))))
def test_the_limit_holds_whatever_comes(calls):
    graphs = Graphs(torch.device("cpu"), limit=100)
    for key, own, growth, uses in calls:
        come(graphs, key, own, growth, uses)
        assert graphs.size <= graphs.limit


@pytest.mark.parametrize(
    ("text", "told"), [("one\ntwo", "one"), ("\n two", "two"), ("", "RuntimeError"), (" \n", "RuntimeError")]
)
def test_every_error_has_a_reason_in_one_line(text, told):
    assert reason(RuntimeError(text)) == told
