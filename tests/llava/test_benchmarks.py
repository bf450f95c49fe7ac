"""The model of real size that the benchmarks ask, in its small size."""

import pytest
from benchmark_checks import *  # noqa: F403

from benchmarks import report
from strategy import RunRecord


@pytest.fixture(scope="module")
def backbone_name() -> str:
    return "llava"


def test_the_decisions_of_the_graph_engine_are_listed_for_each_row():
    record = RunRecord("clse", 4, None)
    record.decide("prefill of 1 x 651 tokens", "captured", "its shapes came for the second time")
    record.decide("vision", "rejected", "too large")
    rows = [
        {"name": "pruned 192 eager", "batch": 1, "graph_report": ""},
        {"name": "pruned 192 graph", "batch": 32, "graph_report": record.graph_report()},
    ]
    assert report.graph_decisions(rows).splitlines() == [
        "decisions of the graph engine:",
        "pruned 192 graph, batch 32:",
        "  1 x prefill of 1 x 651 tokens: captured (its shapes came for the second time)",
        "  1 x vision: rejected (too large)",
    ]
    assert report.graph_decisions(rows[:1]).splitlines()[1].startswith("  none")
