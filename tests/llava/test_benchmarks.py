"""The model of real size that the benchmarks ask, in its small size."""

import json

import pytest
import torch
from benchmark_checks import *  # noqa: F403

from benchmarks import answers, curves, llava_models, points, report, speed
from benchmarks.models import build
from benchmarks.roofline import Roofline, decode_floor, vision_floor
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


@pytest.mark.parametrize(
    ("budget", "told"),
    [("0", "retain_ratio=0.0: allowed is"), ("half", "'half': want numbers with commas between them")],
)
def test_budgets_that_cannot_be_measured_are_refused_before_anything_is_loaded(capsys, budget, told):
    with pytest.raises(SystemExit):
        speed.parse(["--backbone", "llava", "--budget", budget])
    assert told in capsys.readouterr().err


@pytest.mark.parametrize(("multiply_adds", "ms"), [(1, 4000), (3, 6000)])
def test_the_floor_of_vision_is_the_longer_one_of_two_times(multiply_adds, ms):
    parts = [torch.nn.Linear(2, 1), torch.nn.Linear(1, 1, bias=False)]  # 16 bytes of weights
    rates = Roofline(operations=2, bytes=4)
    assert vision_floor(parts, multiply_adds, batch=2, roofline=rates) == ms


def test_the_floor_of_a_decode_step_counts_the_cache_and_the_operations_of_the_batch():
    model = build("llava", "cpu", torch.float32, small=True).model
    layers, head = model.get_decoder().layers, model.get_output_embeddings()
    size = 4 * sum(each.numel() for part in (*layers, head) for each in part.parameters())
    cache = 4 * 2 * 64 * len(layers)  # of a token
    by_bytes = Roofline(operations=1e30, bytes=1000)
    assert decode_floor(model, by_bytes) == pytest.approx(size)
    assert decode_floor(model, by_bytes, batch=3, held=10) == pytest.approx(size + 3 * 10 * cache)
    products = sum(each.numel() for part in (*layers, head) for each in part.parameters() if each.dim() == 2)
    by_operations = Roofline(operations=1000, bytes=1e30)
    pairs = 2 * 64 * len(layers)  # of a token that sees one
    assert decode_floor(model, by_operations, batch=3, held=10) == pytest.approx(2 * 3 * (products + 10 * pairs))


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ("--vary frames", "--vary frames: the prompt of llava has a fixed size; allowed are batch, budget"),
        ("--vary depth", "invalid choice: 'depth'"),
        ("--vary batch --values 2,0", "--values 0: want at least 1"),
        ("--vary batch --values two", "two"),
        ("--vary batch --new 1", "--new 1: want at least 2"),
        ("--vary budget --batch 0", "--batch 0: want at least 1"),
        ("--vary budget --values 0", "retain_ratio"),
        ("--vary batch --strategy visionzip", "--strategy visionzip: it looks at the vision tower"),
    ],
)
def test_curves_that_cannot_be_measured_are_refused_before_anything_is_loaded(capsys, words, told):
    with pytest.raises(SystemExit):
        curves.parse(["--backbone", "llava", *words.split()])
    assert told in capsys.readouterr().err


def test_an_answer_of_the_stock_loop_is_no_point_of_a_curve(tmp_path, monkeypatch, capsys):
    def fall_back(record):
        record.decide("answer", "stock loop", "the model is being trained")
        refuse(record)

    refuse = points._refuse_stock_loop
    monkeypatch.setattr(points, "_refuse_stock_loop", fall_back)
    asked = "--backbone llava --vary batch --values 1 --budget 32 --device cpu --no_tower --output"
    curves.main([*asked.split(), str(tmp_path)])
    assert "unpruned, 1: not measured, the model is being trained" in capsys.readouterr().out


def test_a_program_without_a_graph_is_told_in_the_table_and_drawn(tmp_path, capsys):
    asked = "--backbone llava --vary batch --values 1,2 --budget 32 --device cpu --no_tower --new 3 --output"
    curves.main([*asked.split(), str(tmp_path)])
    [file] = tmp_path.glob("*.json")
    found = json.loads(file.read_text())
    found["points"][0]["graphless"] = ["decode of 1 samples on 64 slots: too large"]
    file.write_text(json.dumps(found))
    capsys.readouterr()
    curves.main(["--plot", str(file)])
    assert "without a graph: decode of 1 samples on 64 slots: too large" in capsys.readouterr().out


def test_points_of_different_curves_are_not_drawn_as_one(tmp_path):
    about = {"backbone": "llava", "strategy": "clse", "vary": "batch", "batch": 1, "device": "A", "dtype": "float16"}
    files = [tmp_path / f"{device}.json" for device in "AB"]
    for file in files:
        file.write_text(json.dumps({"about": about | {"device": file.stem}, "points": [], "towers": []}))
    with pytest.raises(SystemExit, match="--plot: the files differ in backbone"):
        curves.main(["--plot", *map(str, files)])
