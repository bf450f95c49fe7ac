"""What the commands `compare` and `look` owe on every backbone.

A backbone's tests import everything from here and give a fixture `asked`, an `Asked`.
"""

import csv
import importlib
import json
import sys
from dataclasses import dataclass
from pathlib import Path

import libyaml  # noqa: F401
import pytest
from matrix import ENCODED
from PIL import Image

from comparison import cli, compare, look
from comparison.runs import load
from strategy import VTRConfig, available, backbone
from strategy.evaluation.digest import packages_with

ROOT = Path(__file__).parents[1]
PICTURE, QUESTION = "examples/shapes/picture.jpg", "What colour is the star?"


@dataclass(frozen=True)
class Asked:
    """A small checkpoint, its questions, and one picture or video with a question.

    frames: how many pictures stand side by side in a drawing; more: further arguments of the model.
    """

    model: str
    checkpoint: str
    task: str
    image: str
    question: str
    frames: int = 1
    more: str = ""

    def words(self, *more):
        checkpoint = str(ROOT / "examples/shapes/checkpoints" / self.checkpoint)
        tasks = str(ROOT / "examples/shapes/tasks")
        words = ["command", "--model", self.model, "--pretrained", checkpoint, "--include_path", tasks]
        return [*words, *([f"--model_args={self.more}"] if self.more else []), *more]


@pytest.fixture
def type_(monkeypatch, asked):
    """Runs a command as if it was typed."""

    def run(main, *more):
        monkeypatch.setattr(sys, "argv", asked.words(*map(str, more)))
        main()

    return run


def test_compare_makes_what_is_missing_and_reports(asked, type_, tmp_path, capsys, monkeypatch):
    words = ["--strategies", "clse,pool", "--tasks", asked.task, "--limit", 4, "--output", tmp_path]
    words += ["--clse_temp", 0.2]  # reaches the runs of clse only, since pool refuses it
    words += ["--export", tmp_path / "export"]
    type_(compare.main, *words, "--budgets", "64")
    folder = tmp_path / asked.model / Path(asked.task).name
    table = (folder / "table.md").read_text()
    assert table in capsys.readouterr().out
    rows = list(csv.DictReader((folder / "table.csv").open()))
    assert [(row["strategy"], row["budget"]) for row in rows] == [("unpruned", ""), ("clse", "64"), ("pool", "64")]
    assert {row["questions"] for row in rows} == {"4"}
    whole, kept = (float(rows[number]["multiply_adds_prefill"]) for number in (0, 2))
    assert 0 < kept < whole
    assert all(float(row["multiply_adds_vision"]) == float(rows[0]["multiply_adds_vision"]) > 0 for row in rows)
    assert all(float(row[f"seconds_{part}"]) > 0 for row in rows for part in ("vision", "prefill", "decode"))
    report = (folder / "report.html").read_text()
    assert "clse 64" in report
    made = {file.name: file.stat().st_mtime_ns for file in (folder / "runs").iterdir()}
    stored = [load(folder / "runs" / name) for name in made]
    assert all(len(run.scores) == 4 and run.accuracy == sum(run.scores) / 4 for run in stored)
    wrong = any(run.strategy != "unpruned" and min(run.scores) == 0 for run in stored)
    assert report.count("data:image/png") >= 1 + wrong

    exported = [*(tmp_path / "export" / asked.checkpoint).rglob("*.jsonl")]
    assert sorted(file.parts[-3] for file in exported) == ["Downsample", "clse", "pool"]
    for file in exported:
        samples = [json.loads(line) for line in file.read_text().splitlines()]
        assert [sample["doc_id"] for sample in samples] == [0, 1, 2, 3]
        assert [sample["target"] for sample in samples] == list(stored[0].targets)
        assert all(sample["doc"]["question"] and sample["filtered_resps"] for sample in samples)

    type_(compare.main, *words, "--budgets", "64,32")
    again = {file.name: file.stat().st_mtime_ns for file in (folder / "runs").iterdir()}
    assert len(again) == 5
    assert made.items() <= again.items(), "what was there was not made again"


def test_a_budget_that_cannot_be_met_is_a_row_with_its_reason(asked, type_, tmp_path):
    words = ["--strategies", "fastv,uniform,downsample", "--budgets", 8, "--budget_basis", "mean", "--examples", 0]
    type_(compare.main, *words, "--tasks", asked.task, "--limit", 1, "--output", tmp_path)
    folder = tmp_path / asked.model / Path(asked.task).name
    assert "- fastv 8: " in (folder / "table.md").read_text()
    assert "budget_basis=mean" in (folder / "table.md").read_text()
    unpruned, fastv, uniform, smaller = csv.DictReader((folder / "table.csv").open())
    assert fastv["accuracy"] == ""
    assert float(uniform["tokens_per_layer"]) <= 8 < float(unpruned["tokens_per_layer"])
    if asked.frames > 1:
        assert smaller["failed"].startswith("downsample makes pictures smaller, and the frames of Video-LLaVA")
        return
    wanted = float(unpruned["visual_tokens"]) * 8 / 576  # or four, which Qwen's processors want at least
    assert abs(float(smaller["visual_tokens"]) - wanted) <= 1
    assert float(smaller["multiply_adds_vision"]) < float(unpruned["multiply_adds_vision"]) / 10


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--strategies", "clze", "--budgets", "64"], "compare: strategy='clze': allowed are "),
        (["--strategies", "clse", "--budgets", "many"], "compare: --budgets many: want whole numbers"),
        (["--strategies", "clse", "--budgets", "64", "--budget_basis", "tokens"], "compare: budget_basis='tokens'"),
        (["--strategies", "clse", "--budgets", "64", "--examples", "-1"], "compare: --examples -1: want a number"),
        (["--strategies", "clse", "--budgets", "64", "--model_args", "vtr_keep_tokens=3"], "compare: --model_args "),
        (["--strategies", "pool", "--budgets", "64", "--clse_temp", "1"], "compare: clse_temp='1': none of pool uses"),
        (["--strategies", "clse", "--budgets", "64", "--model", "vtr"], "compare: --model vtr: allowed in this"),
    ],
)
def test_a_mistake_in_the_command_is_one_sentence(asked, type_, tmp_path, words, sentence):
    with pytest.raises(SystemExit) as stop:
        type_(compare.main, *words, "--tasks", asked.task, "--output", tmp_path)
    assert str(stop.value).startswith(sentence)
    assert not list(tmp_path.iterdir())


def test_an_output_that_cannot_be_written_is_told_before_anything_is_asked(type_, tmp_path):
    note = tmp_path / "note.md"
    note.write_text("mine")
    for name, words in {
        "compare": ["--strategies", "clse", "--budgets", "64", "--tasks", "none", "--output", note],
        "look": ["--image", "none", "--question", "?", "--output", note],
    }.items():
        with pytest.raises(SystemExit) as stop:
            type_({"compare": compare, "look": look}[name].main, *words)
        assert str(stop.value).startswith(f"{name}: ")
        assert "note.md" in str(stop.value)
    assert note.read_text() == "mine"


def test_a_stop_by_hand_is_one_sentence_that_says_how_to_go_on(asked, type_, tmp_path, monkeypatch):
    def stopped(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(compare, "run_or_load", stopped)
    words = ["--strategies", "clse", "--budgets", "64", "--tasks", asked.task, "--output", tmp_path]
    with pytest.raises(SystemExit, match="compare: stopped; the same command goes on"):
        type_(compare.main, *words)


def test_the_digest_covers_the_packages_that_the_backbone_is_built_from(asked):
    evaluator = cli.load_evaluator(look.parse(asked.words("--image", "i", "--question", "?")[1:]))
    importlib.import_module(evaluator.package)
    own = [each for each in backbone._backbones.values() if type(each).__module__.startswith(f"{evaluator.package}.")]
    lineage = {cls.__module__.partition(".")[0] for each in own for cls in type(each).__mro__} - {"abc", "builtins"}
    assert {"strategy", evaluator.package} <= lineage
    covered = packages_with([evaluator.package])
    assert lineage <= set(covered)
    assert not {"torch", "transformers", "lmms_eval"} & set(covered)


@pytest.mark.shared
@pytest.mark.parametrize("name", available())
def test_look_draws_what_each_strategy_saw(asked, type_, tmp_path, capsys, name):
    picture = tmp_path / "look.png"
    words = ["--image", ROOT / asked.image, "--question", asked.question, "--output", picture]
    if name in ENCODED and asked.frames > 1:  # the tower of Video-LLaVA is not described
        refused = f"^(look|{asked.model}): {name} looks at what the vision tower saw, but the backbone "
        with pytest.raises(SystemExit, match=refused):
            type_(look.main, *words, "--strategy", name, "--keep_tokens", 64)
        return
    type_(look.main, *words, "--strategy", name, "--keep_tokens", 64)
    said = capsys.readouterr().out
    assert f"{name} 64: " in said
    assert "unpruned: " in said
    with Image.open(picture) as drawn:
        assert drawn.width > 200 * min(3, asked.frames)


def test_look_at_a_stage_that_drops_nothing_and_at_none_that_does(asked, type_, tmp_path):
    words = ["--image", ROOT / asked.image, "--question", asked.question, "--output", tmp_path / "look.png"]
    for ratios in ("1;0.5;0.1", "1;1;1"):
        type_(look.main, *words, "--retain_ratio", ratios, "--prune_layer", "1;4;8", "--ref_layers", 0)
        assert (tmp_path / "look.png").stat().st_size > 0


def test_look_names_a_picture_that_cannot_be_read(asked, type_, tmp_path):
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"nothing")
    with pytest.raises(SystemExit) as stop:
        type_(look.main, "--image", broken, "--question", "What?", "--output", tmp_path / "look.png")
    assert str(stop.value).startswith("look: ")
    assert "broken.png" in str(stop.value)
    assert not (tmp_path / "look.png").exists()


def test_the_options_of_look_are_those_of_the_configuration(asked, type_, tmp_path):
    with pytest.raises(SystemExit) as stop:
        type_(look.main, "--image", "x", "--question", "?", "--keep_tokens", "0")
    with pytest.raises(ValueError, match="keep_tokens") as error:
        VTRConfig(keep_tokens="0")
    assert str(stop.value) == f"look: {error.value}"
