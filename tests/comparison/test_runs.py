"""Runs: stored in full or not at all, and read back as they were."""

import json
import math
import os
from collections import Counter

import pytest

from comparison import runs as module
from comparison.runs import load, ordered, pool, pooled, save

HOSTILE = '<script>alert("1")</script> | \\ \n\r\t \u2028 \U0001f600 \ud800 \x00 $x_1$'


def test_round_trip(run, tmp_path):
    told = run("clse", 192, graph_report="1 x vision: captured (a)\n2 x answer: stock loop (b)")
    for made in (run(), told, run("clse", 64, answers=(HOSTILE,) * 200)):
        save(made, tmp_path / "run.json")
        assert load(tmp_path / "run.json") == made


def test_a_run_stored_without_decisions_about_graphs_comes_back(run, tmp_path):
    save(run(), tmp_path / "run.json")
    stored = json.loads((tmp_path / "run.json").read_text())
    del stored["graph_report"]
    (tmp_path / "run.json").write_text(json.dumps(stored))
    assert load(tmp_path / "run.json") == run()


def test_a_failed_run_comes_back_and_is_valid_json(failed, tmp_path):
    path = tmp_path / "deep" / "run.json"
    save(failed(reason=HOSTILE), path)

    def refuse(constant):
        raise AssertionError(constant)

    assert json.loads(path.read_text(), parse_constant=refuse)["accuracy"] is None
    back = load(path)
    assert math.isnan(back.accuracy)
    assert math.isnan(back.seconds)
    assert math.isnan(back.operations)
    assert (back.failed, back.scores, back.record, back.budget) == (HOSTILE, (), {}, 9000)


def test_nan_inside_the_record(run, tmp_path):
    made = run()
    made.record["cache_bytes"] = math.nan
    save(made, tmp_path / "run.json")
    assert math.isnan(load(tmp_path / "run.json").record["cache_bytes"])


def test_runs_of_several_seeds_are_their_mean(run, failed):
    one, two = run("random", 64, 0.5, seconds=1.0), run("random", 64, 0.75, {2: 100, 4: 50}, seconds=2.0)
    made = pool([one, two])
    assert (made.accuracy, made.seconds, made.name) == (0.625, 1.5, "random 64")
    assert Counter(made.scores) == {1.0: 100, 0.5: 50, 0.0: 50}
    assert (made.draws, made.draw_accuracies) == ((one.scores, two.scores), (0.5, 0.75))
    for name in ("multiply_adds", "seconds"):
        parts = one.record[name], two.record[name]
        assert made.record[name] == pytest.approx({part: (parts[0][part] + parts[1][part]) / 2 for part in parts[0]})
    assert made.record["tokens_by_layer"][4] == (32 + 50) / 2
    assert pool([one]) is one
    assert pool([one, failed("random", 64)]).failed
    assert [each.name for each in pooled([run(), one, run("clse", 64), two])] == ["unpruned", "random 64", "clse 64"]


def test_a_budget_as_a_share(run):
    assert (run().ratio, run("clse", 144, nominal_tokens=576).ratio) == (1, 0.25)
    assert math.isnan(run("clse", 144).ratio)


def test_names(run):
    assert [run().name, run("clse", 192).name] == ["unpruned", "clse 192"]


def test_operations_are_the_four_parts(run):
    made = run("clse", 192)
    parts = made.record["multiply_adds"]
    assert made.operations == parts["vision"] + parts["prefill"] + parts["scoring"] + parts["head"]


@pytest.mark.parametrize("step", ["write_bytes", "replace"])
def test_an_old_file_survives_a_save_that_fails(run, tmp_path, monkeypatch, step):
    path = tmp_path / "run.json"
    save(run(), path)

    def half(part, content):
        with part.open("wb") as file:
            file.write(content[:10])
        raise OSError("disk full")

    def stop(*_):
        raise KeyboardInterrupt

    if step == "write_bytes":
        monkeypatch.setattr(module.Path, step, half)
    else:
        monkeypatch.setattr(os, step, stop)
    with pytest.raises((OSError, KeyboardInterrupt)):
        save(run("clse", 192), path)
    monkeypatch.undo()
    assert load(path) == run()
    assert os.listdir(tmp_path) == ["run.json"]


def test_what_json_cannot_hold_leaves_the_old_file(run, tmp_path):
    path = tmp_path / "run.json"
    save(run(), path)
    with pytest.raises(ValueError, match="JSON"):
        save(run(seconds=math.inf), path)
    with pytest.raises(TypeError):
        save(run(answers=(b"bytes",)), path)
    assert load(path) == run()


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"5", b"{}", b'{"budget": 1, "failed": null, "x": 1}', b"\xff"])
def test_a_broken_file_is_one_sentence_that_names_it(content, tmp_path):
    path = tmp_path / "run.json"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"run\.json holds no stored run"):
        load(path)


def test_order(runs, run):
    assert [one.name for one in ordered(runs)] == ["unpruned", "clse 192", "clse 64", "fastv 9000", "random 192"]
    with pytest.raises(ValueError, match="same questions"):
        ordered([*runs, run("late", 64, targets=("no",) * 200)])
    with pytest.raises(ValueError, match="same questions"):
        ordered([*runs, run("late", 64, task="pope")])
