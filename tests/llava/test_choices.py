"""A stock `multiple_choice` task of lmms-eval, from the command line to its score, and in a comparison."""

import json
import subprocess
import sys

import pytest
from lmms_checks import CHECKPOINTS, ENVIRONMENT, LMMS_EVAL, TASKS

from comparison.lmms import Lmms

CHECKPOINT = CHECKPOINTS / "shapes-llava"
TASK = f"""
task: shapes_choice
dataset_path: parquet
dataset_kwargs:
  data_files:
    test: {TASKS / "shapes_test.parquet"}
test_split: test
output_type: multiple_choice
doc_to_visual: !function utils.visual
doc_to_text: "{{{{question}}}}"
doc_to_target: !function utils.target
doc_to_choice: !function utils.choices
metric_list:
  - metric: acc
    aggregation: mean
    higher_is_better: true
"""
UTILS = """
def visual(doc):
    return [doc["image"]]


def choices(doc):
    return sorted({doc["answer"], "yes", "square"})


def target(doc):
    return choices(doc).index(doc["answer"])
"""
QUESTIONS = 4


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with a task of choices."""
    folder = tmp_path_factory.mktemp("tasks")
    (folder / "shapes_choice.yaml").write_text(TASK)
    (folder / "utils.py").write_text(UTILS)
    return folder


def test_the_command_line_scores_choices_and_resumes(lmms_eval, folder, tmp_path):
    arguments = f"pretrained={CHECKPOINT},keep_tokens=192,resume_folder={tmp_path / 'answers'}"
    command = ["--model", "llava_vtr", "--model_args", arguments, "--batch_size", "1"]
    command += ["--tasks", "shapes_choice", "--include_path", str(folder), "--limit", str(QUESTIONS), "--output_path"]
    # The first run's journal is its own until its process ends.
    words = [sys.executable, LMMS_EVAL, *command, str(tmp_path / "first")]
    done = subprocess.run(words, env=ENVIRONMENT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "samples (means over samples)" in done.stdout + done.stderr
    done = lmms_eval(*command, tmp_path / "second")
    assert done.returncode == 0, done.stderr[-2000:]
    assert "were answered by an earlier run" in done.stdout + done.stderr
    for run in ("first", "second"):
        [results] = (tmp_path / run).rglob("*results.json")
        assert json.loads(results.read_text())["results"]["shapes_choice"]["acc,none"] == 1


def test_a_comparison_shows_the_number_of_the_best_choice(folder):
    evaluator = Lmms("llava_vtr", str(CHECKPOINT), "device=cpu", str(folder))
    run = evaluator.run("shapes_choice", {"enabled": False}, QUESTIONS)
    assert (run.metric, run.accuracy, run.scores) == ("acc", 1.0, (1.0,) * QUESTIONS)
    assert run.answers == run.targets
    assert run.seconds > 0
    [inspection] = evaluator.inspect_many("shapes_choice", [1], {"keep_tokens": 192}, QUESTIONS)
    assert inspection.answer == inspection.target == run.targets[1]
    assert inspection.kept
