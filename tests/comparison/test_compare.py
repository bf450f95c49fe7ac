"""Which runs `compare` makes, where it stores them, and which questions it shows."""

import math
from dataclasses import replace

import pytest

from comparison import compare
from comparison.runs import strategy_and_budget


class Evaluator:
    """Returns runs, or raises an error."""

    def __init__(self, make, error=None):
        self.make, self.error, self.calls = make, error, []

    def run(self, task, options, limit):
        self.calls.append(options)
        if self.error:
            raise self.error
        made = self.make(options.get("strategy", "unpruned"), options.get("keep_tokens"))
        return replace(made, budget=strategy_and_budget(options)[1])


def path(tmp_path, settings=None, **options):
    return compare.path_of(tmp_path, settings or {"digest": "1"}, {"strategy": "fastv", "keep_tokens": 64} | options)


def test_a_stored_run_has_a_name_of_its_own(tmp_path):
    paths = {
        path(tmp_path),
        path(tmp_path, {"digest": "2"}),
        path(tmp_path, keep_tokens=32),
        path(tmp_path, strategy="clse"),
        path(tmp_path, budget_basis="mean"),
        path(tmp_path, prune_layer="1;2/3"),
        path(tmp_path, enabled=False),
        path(tmp_path, enabled=False, downsample=64),
    }
    assert len(paths) == 8
    assert {each.parent for each in paths} == {tmp_path / "runs"}
    assert path(tmp_path).name.startswith("fastv-64-")


def test_an_option_with_its_default_is_the_same_run(tmp_path):
    assert path(tmp_path, budget_basis="stages") == path(tmp_path)


def test_a_run_is_made_once(run, tmp_path):
    evaluator, options, file = Evaluator(run), {"strategy": "clse", "keep_tokens": 64}, tmp_path / "run.json"
    first = compare.run_or_load(evaluator, "shapes", options, None, file)
    assert compare.run_or_load(evaluator, "shapes", options, None, file) == first == run("clse", 64)
    assert evaluator.calls == [options]


@pytest.fixture
def comparing(run, monkeypatch, tmp_path):
    """Compares with an evaluator that makes runs up; returns the arguments and the runs."""
    monkeypatch.setattr(compare.digest, "of_code", lambda *_: "1")
    monkeypatch.setattr(compare, "facts", lambda *_: {})  # which need transformers

    def made(make, *words):
        evaluator = Evaluator(make)
        evaluator.package = "llava"
        words = ["--tasks", "shapes", "--examples", "0", *words]
        arguments = compare.parse(["--model", "m", "--pretrained", "llava-v1.5-7b", *words, "--output", str(tmp_path)])
        return compare.compare(evaluator, arguments, compare.options_of_runs(arguments), arguments.tasks)

    return made


def test_each_seed_is_stored_and_the_table_has_their_mean(run, comparing, tmp_path):
    accuracies = iter([0.5, 0.6, 0.7])

    def make(strategy, budget):
        return run(strategy, budget, next(accuracies) if strategy == "random" else 0.9)

    runs = comparing(make, "--strategies", "random,clse", "--budgets", "64")
    assert [each.name for each in runs] == ["unpruned", "random 64", "clse 64"]
    assert runs[1].accuracy == pytest.approx(0.6)
    assert len(list((tmp_path / "m/shapes/runs").glob("random-64-*.json"))) == 3
    table = (tmp_path / "m/shapes/table.md").read_text()
    assert "standard deviation over seeds" in table
    assert comparing(make, "--strategies", "random,clse", "--budgets", "64") == runs, "as stored"


def test_calibrated_runs_measure_alike_and_stand_at_the_budget_asked_for(run, comparing, tmp_path):
    def make(strategy, budget):
        kept = {2: 576} if budget is None else {2: budget} if strategy == "uniform" else {2: budget * 2}
        made = run(strategy, budget, 0.8, kept, nominal_tokens=576)
        if strategy == "fastv":
            made.record["tokens_per_layer"] = 500.0
        return made

    words = ["--strategies", "uniform,pool,fastv", "--budgets", "64", "--calibrate", "tokens"]
    unpruned, uniform, pool, fastv = comparing(make, *words)
    assert (unpruned.strategy, uniform.budget, pool.name) == ("unpruned", 64, "pool 64")
    assert uniform.record["kept_tokens"] == pool.record["kept_tokens"] == [64]
    assert fastv.failed.startswith("--calibrate tokens: no budget measures near 234.7: the nearest is ")
    assert {file.name.rpartition("-")[0] for file in (tmp_path / "m/shapes/runs").iterdir()} == {
        *("unpruned", "uniform-64", "pool-64")
    }


@pytest.mark.parametrize(
    ("words", "shown"), [([], True), (["--limit", "5"], False), (["--budget_basis", "mean"], False)]
)
def test_published_figures_are_shown_for_whole_tasks_and_the_papers_options(run, comparing, tmp_path, words, shown):
    comparing(lambda *named: run(*named, task="gqa"), "--strategies", "fastv", "--budgets", "64", *words)
    for name in ("table.md", "report.html"):
        assert ("arXiv 2602.04657" in (tmp_path / "m/shapes" / name).read_text()) == shown


def test_decisions_about_graphs_are_printed_behind_their_run(run, comparing, tmp_path, capsys):
    def make(strategy, budget):
        report = "3 x answer: stock loop (the model is being trained)"
        return run(strategy, budget, graph_report=report if strategy == "clse" else "")

    for _ in range(2):  # a stored run tells them too
        comparing(make, "--strategies", "clse", "--budgets", "64")
        said = capsys.readouterr().out
        assert said.count("decisions of the graph engine:\n3 x answer: stock loop (the model is being trained)\n") == 1
        assert said.index("run 2 of 2") < said.index("decisions")
    assert "the model is being trained" in (tmp_path / "m/shapes/report.html").read_text()


@pytest.mark.parametrize("error", [ValueError("too many"), SystemExit("too many")])
def test_a_refused_run_keeps_its_reason_and_is_not_stored(run, tmp_path, error):
    evaluator, file = Evaluator(run, error), tmp_path / "run.json"
    failed = compare.run_or_load(evaluator, "shapes", {"strategy": "clse", "keep_tokens": 64}, None, file)
    assert (failed.name, failed.failed, failed.scores, failed.record) == ("clse 64", "too many", (), {})
    assert math.isnan(failed.accuracy)
    failed = compare.run_or_load(evaluator, "shapes", {"enabled": False, "downsample": 64}, None, file)
    assert (failed.name, failed.failed) == ("downsample 64", "too many")
    with pytest.raises(type(error), match="too many"):
        compare.run_or_load(evaluator, "shapes", {"enabled": False}, None, file)
    assert not file.exists()


def test_examples_are_right_and_wrong_ones_at_the_smallest_budget(run):
    unpruned, large, small = run(), run("clse", 192, 0.88), run("clse", 64, 0.7)
    other = run("pool", 64, 0.7)
    chosen = compare.choose_examples([unpruned, large, small, other], 1)
    assert chosen == [(small, 0), (small, 140), (other, 1), (other, 141)]
    assert compare.choose_examples([unpruned, large], 0) == []
    assert compare.choose_examples([run(scores=()), small], 1) == []
