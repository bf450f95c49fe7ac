"""The model of real size that the benchmarks ask, in its small size."""

import json

import pytest
import torch
from benchmark_checks import *  # noqa: F403

from benchmarks import answers, llava_models, report
from benchmarks.roofline import Roofline, vision_floor
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


def test_answers_that_come_in_another_order_are_counted_and_told(tmp_path, capsys, monkeypatch):
    def backwards(function, batches, join, workers):
        yield from (join([*map(function, batch)]) for batch in batches[::-1])

    monkeypatch.setattr(llava_models, "prepare_batches", backwards)
    asked = "--backbone llava --budget 32 --device cpu --prompts 2 --new 4 --output"
    answers.main([*asked.split(), str(tmp_path)])
    [report_file] = tmp_path.glob("*.json")
    assert [row["differing"] for row in json.loads(report_file.read_text())["rows"]][:2] == [2, 2]
    assert "unpruned eager, batch 1: 2 answers differ between the three runs" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ("--new 1", "--new 1: want at least 2"),
        ("--prompts 1", "--prompts 1: want at least 2"),
        ("--workers 0", "--workers 0: want at least 1"),
        ("--batches 2,0", "--batches 0: want at least 1"),
        ("--batches two", "two"),
        ("--budget 0", "retain_ratio"),
    ],
)
def test_answers_that_cannot_be_measured_are_refused_before_anything_is_loaded(capsys, words, told):
    with pytest.raises(SystemExit):
        answers.parse(["--backbone", "llava", *words.split()])
    assert told in capsys.readouterr().err


@pytest.mark.parametrize(("multiply_adds", "ms"), [(1, 4000), (3, 6000)])
def test_the_floor_of_vision_is_the_longer_one_of_two_times(multiply_adds, ms):
    parts = [torch.nn.Linear(2, 1), torch.nn.Linear(1, 1, bias=False)]  # 16 bytes of weights
    rates = Roofline(operations=2, bytes=4)
    assert vision_floor(parts, multiply_adds, batch=2, roofline=rates) == ms
