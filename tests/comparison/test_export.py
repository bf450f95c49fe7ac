"""Exports: the layout that VTC-Bench reads, and a table with one line a method, ratio and task."""

import csv
import json

import pytest

from comparison.export import export
from comparison.runs import pooled

SAMPLES = tuple(
    json.dumps({"doc_id": number, "doc": {"answer": "yes"}, "filtered_resps": "yes"}) for number in range(3)
)


@pytest.fixture
def sampled(run):
    """The maker of runs that can be exported."""
    return lambda *given, **changes: run(*given, **{"samples": SAMPLES, "nominal_tokens": 576} | changes)


def test_samples_lie_where_vtc_bench_looks_for_them(sampled, failed, tmp_path):
    runs = [
        sampled(),
        sampled("clse", 64),
        sampled("clse", 192),
        sampled("downsample", 64),
        sampled("downsample", 100),
        failed(),
    ]
    folder = export(tmp_path, "liuhaotian/llava-v1.5-7b", [runs])
    assert folder == tmp_path / "llava-v1.5-7b"
    files = {str(file.relative_to(folder)) for file in folder.rglob("*.jsonl")}
    assert files == {
        *("Downsample/1/shapes.jsonl", "clse/0.1111/shapes.jsonl", "clse/0.3333/shapes.jsonl"),
        *("Downsample/3/shapes.jsonl", "Downsample/0.1736/shapes.jsonl"),
    }
    assert tuple((folder / "clse/0.1111/shapes.jsonl").read_text().splitlines()) == SAMPLES


def test_the_table_is_tidy(sampled, tmp_path):
    draws = [sampled("random", 144, accuracy) for accuracy in (0.5, 0.6)]
    video = sampled("clse", 512, 0.7, task="folder/clips", nominal_tokens=2048)
    runs = [pooled([sampled(), sampled("clse", 144, 0.81), *draws]), [sampled(task="folder/clips"), video]]
    rows = list(csv.DictReader((export(tmp_path, "m/", runs) / "results.csv").open()))
    assert [(row["task"], row["method"], row["ratio_kept"], row["seeds"]) for row in rows] == [
        ("shapes", "unpruned", "1.0", "1"),
        ("shapes", "clse", "0.25", "1"),
        ("shapes", "random", "0.25", "2"),
        ("clips", "unpruned", "1.0", "1"),
        ("clips", "clse", "0.25", "1"),
    ]
    assert {row["model"] for row in rows} == {"m"}
    clse = rows[1]
    assert [float(clse[name]) for name in ("value", "unpruned", "percent_pruned")] == [0.81, 0.9, 75]
    assert float(clse["percent_of_unpruned"]) == pytest.approx(90)
    assert clse["budget"] == "144"
    assert rows[0]["budget"] == ""


def test_a_run_without_samples_is_named_and_nothing_is_written(sampled, run, tmp_path):
    with pytest.raises(ValueError, match="the stored run clse 64 of shapes has no samples: delete it to make it anew"):
        export(tmp_path, "m", [[sampled(), run("clse", 64)]])
    assert not list(tmp_path.iterdir())
