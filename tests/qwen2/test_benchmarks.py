"""The models of real size that the benchmarks ask, in their small size, and what is measured in several processes."""

import json
import sys

import pytest
import torch
from benchmark_checks import *  # noqa: F403
from launching import run

from benchmarks import mixed, scaling
from benchmarks.models import build


@pytest.fixture(scope="module")
def backbone_name() -> str:
    return "qwen2"


def test_the_large_one_has_the_published_size():
    case = build("qwen2-72b", "meta", torch.float16)
    assert sum(parameter.numel() for parameter in case.model.parameters()) == pytest.approx(73.4e9, rel=1e-3)


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ("--new 1", "--new 1 --repeats 15: want at least 2 tokens"),
        ("--budget 0", "retain_ratio"),
        ("--budget few", "few"),
        ("--tensor_parallel 2", "tensor_parallel=2: want 2 processes"),
        ("--zero_stage 3", "zero_stage=3: want several processes"),
        ("--engine fast", "engine='fast'"),
    ],
)
def test_what_cannot_be_measured_is_told_before_anything_is_loaded(capsys, words, told):
    with pytest.raises(SystemExit):
        scaling.parse(["--backbone", "qwen2-72b", "--device", "cpu", *words.split()])
    assert told in capsys.readouterr().err


def test_sharded_weights_are_not_measured_by_graph(capsys, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    words = "--backbone qwen2-72b --device cpu --budget 0.334 --zero_stage 3 --engine graph"
    with pytest.raises(SystemExit):
        scaling.parse(words.split(" "))
    assert "--engine graph: sharded weights" in capsys.readouterr().err


@pytest.mark.processes
@pytest.mark.parametrize("way", ["tensor_parallel=2", "zero_stage=3"])
def test_what_several_processes_take_is_measured(tmp_path, way):
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "-m", "benchmarks.scaling"]
    command += ["--backbone", "qwen2-72b", "--device", "cpu", "--budget", "0.334", "--new", "2", "--repeats", "1"]
    done = run([*command, "--output", str(tmp_path), f"--{way}"])
    assert done.returncode == 0, done.stderr[-2000:]
    assert "| pruned 0.334 | 82/51/14 " in done.stdout
    [file] = tmp_path.iterdir()
    unpruned, pruned = json.loads(file.read_text())["rows"]
    whole = build("qwen2-72b", "cpu", torch.float32, small=True).model
    size, layers = (sum(p.nbytes for p in part.parameters()) for part in (whole, whole.get_decoder().layers))
    # Norms are not split, and shares are rounded up.
    assert size - layers / 2 <= pruned["weights"] == unpruned["weights"] < size - 0.49 * layers
    assert unpruned["collectives"]["all-reduce"] > 0
    assert pruned["collectives"]["all-gather"] > 0
    assert (unpruned["collectives"]["all-gather"] > 0) == way.startswith("zero")
    assert (pruned["collectives"]["broadcast"] > 0) == way.startswith("tensor")


def test_pictures_of_many_sizes_are_measured_beside_as_many_of_one_size(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(mixed, "MEASURED", 1)
    words = "--backbone qwen2 --budget 0.334 --device cpu --batch 3 --new 2 --output"
    mixed.main([*words.split(), str(tmp_path)])
    file = next(tmp_path.glob("*.json"))
    rows = json.loads(file.read_text())["rows"]
    names = [f"{way} {engine}" for engine in ("graph", "eager") for way in ("pruned 0.334", "unpruned")]
    assert [(row["name"], row["sizes"]) for row in rows] == [
        (name, sizes) for name in names for sizes in ("one", "many", "many, third time")
    ]
    assert all(row["visual"] == pytest.approx(3 * 144, rel=0.05) for row in rows)
    assert all(0 < row["prefill"] < row["first"] for row in rows)
    assert file.with_suffix(".md").read_text() in capsys.readouterr().out


def test_sizes_of_a_mixed_batch_differ_and_are_drawn_from_a_seed():
    sizes = mixed.grids(16, 1296, seed=5)
    assert len(set(sizes)) == 16
    assert sum(height * width for height, width in sizes) == pytest.approx(16 * 1296, rel=0.02)
    assert sizes == mixed.grids(16, 1296, seed=5) != mixed.grids(16, 1296, seed=6)


@pytest.mark.parametrize(
    ("words", "told"),
    [("--backbone llava", "its pictures have one size"), ("--backbone qwen2 --batch 1", "at least 2")],
)
def test_what_cannot_be_mixed_is_told(capsys, words, told):
    with pytest.raises(SystemExit):
        mixed.parse([*words.split(), "--budget", "0.334", "--device", "cpu"])
    assert told in capsys.readouterr().err
