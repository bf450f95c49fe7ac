"""Which graphs are kept when memory is short or others fail; how they are captured needs a GPU, see `gpu_checks`."""

from contextlib import nullcontext
from typing import Any
from unittest.mock import MagicMock

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from strategy.distributed import collectives
from strategy.graph.cuda_graphs import MIN_REPLAYS, CapturedGraph, CudaGraphCache, ProgramKey
from strategy.kernels.errors import first_line
from strategy.metrics.record import RunRecord


def come(graphs: CudaGraphCache, name: str, own: int, growth: int, uses: int = 1) -> bool:
    """Let a program come as `run` does, with the bytes that are its own and those by which what all share grows."""
    key = ProgramKey(name)
    if key in graphs.rejected:
        return False
    if key not in graphs.graphs:
        if not graphs.graphs:
            graphs.shared = 0
        graphs.shared += growth
        nothing: Any = None
        graphs._keep(key, CapturedGraph(nothing, print, (), None, own))
    if key in graphs.graphs:
        graphs.graphs.move_to_end(key)
        graphs.graphs[key].replays += uses
    return key in graphs.graphs


def test_what_is_too_large_alone_is_told_by_itself_and_bans_no_other():
    graphs = CudaGraphCache(torch.device("cpu"), limit=100)
    for _ in range(3):
        assert come(graphs, "decode", 20, 5)
        assert come(graphs, "prefill", 5, 10)
        assert not come(graphs, "big", 90, 60)
    assert set(graphs.rejected) == {ProgramKey("big")}


def test_what_had_to_go_twice_before_it_was_of_use_is_not_captured_again():
    graphs = CudaGraphCache(torch.device("cpu"), limit=100)
    for turn in range(4):
        assert come(graphs, "one", 60, 0) == (turn < 2)
        assert come(graphs, "other", 60, 0)
    assert set(graphs.rejected) == {ProgramKey("one")}


def test_what_was_of_use_may_come_again():
    graphs = CudaGraphCache(torch.device("cpu"), limit=100)
    for _ in range(9):
        assert come(graphs, "one", 60, 0, uses=MIN_REPLAYS)
        assert come(graphs, "other", 60, 0, uses=MIN_REPLAYS)
    assert not graphs.rejected


@given(st.lists(st.tuples(st.sampled_from("abcdef"), st.integers(0, 120), st.integers(0, 120), st.integers(0, 9))))
def test_the_limit_holds_whatever_comes(calls):
    graphs = CudaGraphCache(torch.device("cpu"), limit=100)
    for key, own, growth, uses in calls:
        come(graphs, key, own, growth, uses)
        assert graphs.size <= graphs.limit


@pytest.mark.parametrize(
    ("text", "told"), [("one\ntwo", "one"), ("\n two", "two"), ("", "RuntimeError"), (" \n", "RuntimeError")]
)
def test_every_error_has_a_reason_in_one_line(text, told):
    assert first_line(RuntimeError(text)) == told


@pytest.fixture
def pretended(monkeypatch: pytest.MonkeyPatch) -> None:
    """A capture that only runs the program, as there is no GPU."""
    for name in ("CUDAGraph", "current_stream", "current_device", "graph_pool_handle", "default_generators"):
        monkeypatch.setattr(torch.cuda, name, MagicMock())
    monkeypatch.setattr(torch.cuda, "stream", nullcontext)
    monkeypatch.setattr(torch.cuda, "Stream", MagicMock(side_effect=lambda device: MagicMock(device=device)))
    monkeypatch.setattr(torch.cuda, "graph", MagicMock(return_value=nullcontext()))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda _: 0)


def test_every_run_without_a_graph_is_reported_with_its_reason(pretended):
    record = RunRecord("clse", 4, None)
    graphs = CudaGraphCache(torch.device("cpu"), limit=100, report=record.decide)

    def run(kind: str, length: int, size: int = 5) -> None:
        graphs._run(ProgramKey(kind, length, f"of {length} tokens"), lambda: None, (), size, warmup=False)

    for length in range(3):  # shapes that never come again
        run("prefill", length)
    assert record.graph_report() == "3 x prefill: ran without a graph (first time of these shapes)"
    for _ in range(4):
        run("decode", 7)
        run("vision", 9, size=200)
    assert record.graph_report().splitlines()[1:] == [
        "1 x decode: ran without a graph (first time of these shapes)",
        "1 x vision: ran without a graph (first time of these shapes)",
        "1 x decode of 7 tokens: captured (its shapes came for the second time)",
        "1 x vision of 9 tokens: rejected (too large: 200 bytes with the shared memory, of 100 allowed)",
        "3 x vision of 9 tokens: ran without a graph (too large: 200 bytes with the shared memory, of 100 allowed)",
    ]


@pytest.mark.parametrize(
    ("error", "worst", "why"),
    [
        (None, [0, -70], "on another rank"),
        (RuntimeError("\n not allowed"), [0, 0], "not allowed"),
        (torch.cuda.OutOfMemoryError(), [0, 0], "OutOfMemoryError"),
    ],
)
def test_what_one_process_cannot_capture_none_of_its_group_does(pretended, monkeypatch, error, worst, why):
    told = MagicMock(return_value=worst)
    monkeypatch.setattr(collectives, "all_reduce_min", told)
    graphs = CudaGraphCache(torch.device("cpu"), limit=100, group=MagicMock())
    with pytest.warns(UserWarning, match=f"one: runs without a CUDA graph .*{why}"):
        assert not graphs._capture(ProgramKey("one"), MagicMock(side_effect=error), (), 5, warmup=False)
    assert told.call_args.args[0] == [error is None, 0]
    assert (set(graphs.rejected), graphs.shared, list(graphs.graphs)) == ({ProgramKey("one")}, -worst[1], [])


def test_what_all_processes_capture_takes_as_much_room_as_where_it_takes_most(pretended, monkeypatch):
    monkeypatch.setattr(collectives, "all_reduce_min", lambda own, *_: [1, own[1] - 70])
    graphs = CudaGraphCache(torch.device("cpu"), limit=100, group=MagicMock())
    assert graphs._capture(ProgramKey("one"), MagicMock(), (), 5, warmup=False)
    assert graphs.size == 75


def test_graphs_are_captured_on_a_stream_of_their_own_card(pretended):
    # Torch's own stream for captures belongs to the card of the first one in a process, and records nothing elsewhere.
    first, second = (CudaGraphCache(torch.device(f"cuda:{number}"), limit=100) for number in range(2))
    for graphs in (first, first, second):
        key = ProgramKey("one", len(graphs.graphs))
        assert graphs._capture(key, MagicMock(), (), 5, warmup=False)
    streams = [call.args[2] for call in torch.cuda.graph.call_args_list]
    assert [stream.device.index for stream in streams] == [0, 0, 1]
    assert streams[0] is streams[1]


def test_graphs_go_before_the_group_that_they_call():
    graphs = CudaGraphCache(torch.device("cpu"), limit=100, group=MagicMock())
    assert come(graphs, "one", 20, 5)
    collectives.shutdown_process_groups()
    assert not graphs.graphs
