"""Whatever the documents tell people to type is run here, or parsed by what would run it."""

import os
import re
import shlex
import shutil
import subprocess
import sys

import pytest
import tomllib
import torch
from documents import COMMANDS, DOCUMENTS, ROOT, blocks, commands, evaluations
from lmms_eval.__main__ import parse_eval_args
from lmms_eval.tasks import TaskManager
from lmms_eval.utils import simple_parse_args_string
from torch.distributed import run
from transformers import LlamaConfig, LlamaModel

import strategy
import training
from benchmarks import scaling, speed
from comparison import compare
from llava.lmms_eval_model import ARGUMENTS
from strategy import registry


def test_every_documented_command_is_of_a_kind_that_is_tried_here():
    for document, words in COMMANDS:
        assert words[0] in ("pip", "nox", "python"), f"{document}: {shlex.join(words)}"


def test_documented_sessions_exist():
    noxfile = (ROOT / "noxfile.py").read_text()
    sessions = set(re.findall(r"^def (\w+)\(session|^    \"(\w+)\": Backbone", noxfile, re.MULTILINE))
    sessions = {name for names in sessions for name in names if name}
    named = {words[2] for _, words in COMMANDS if words[:2] == ["nox", "-s"]}
    assert named
    assert named <= sessions


@pytest.mark.parametrize("words", evaluations("llava_vtr"), ids=lambda words: words[3][-60:])
def test_documented_evaluations_are_understood(words, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["lmms_eval", *words])
    _, options = parse_eval_args()
    arguments = simple_parse_args_string(options.model_args)
    strategy.VTRConfig.take(arguments)
    assert set(arguments) <= set(ARGUMENTS)
    known = TaskManager(include_path=str(ROOT / "examples/shapes/tasks")).all_tasks
    assert set(options.tasks.split(",")) <= set(known)


def test_documented_python_runs_and_its_strategy_prunes(monkeypatch):
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(registry, "_strategies", dict(registry._strategies))
    for document, block in blocks("python"):
        # These have tests of their own, the first two in their own environments.
        if document.parent.parent.name in ("image", "video") or document.name == "ADDING_A_STRATEGY.md":
            continue
        exec(compile(block, str(document), "exec"), {"__name__": "documented"})
    decoder = LlamaModel(LlamaConfig(vocab_size=8, hidden_size=16, intermediate_size=16, num_attention_heads=2))
    config = strategy.VTRConfig(strategy="attention", keep_tokens=9)
    with strategy.prune(decoder, config, backbone="llava", layout=[[(2, (1, 8, 8))]]) as run:
        decoder(inputs_embeds=torch.randn(1, 70, 16))
    assert [stage.after for stage in run.stages] == [15, 9, 2]


@pytest.mark.parametrize("name", ["llava", "qwen2", "qwen3", "video"])
def test_the_documented_training_is_understood(monkeypatch, name):
    [words] = [words for _, words in COMMANDS if any(f"train_{name}" in word for word in words)]
    start = next(i for i, word in enumerate(words) if f"train_{name}" in word)
    assert (ROOT / words[start]).is_file()
    monkeypatch.setattr(sys, "argv", words[start:])
    assert str(training.options("").out) == f"/tmp/shapes-{name}/checkpoint"


def test_a_documented_strategy_is_one_short_file_that_the_matrix_tests(tmp_path):
    [block] = [block for document, block in blocks("python") if document.name == "ADDING_A_STRATEGY.md"]
    assert len(block.splitlines()) < 40
    for folder in ("strategy", "tests"):
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=shutil.ignore_patterns("*.safetensors", "__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    (tmp_path / "strategy/change.py").write_text(block)
    tests = ["tests/llava/test_engine.py", "tests/strategy"]
    command = [sys.executable, "-m", "pytest", *tests, "-k", "change", "-p", "no:cacheprovider"]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(tmp_path), str(ROOT / "examples/shapes")])}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
    assert int(re.search(r"(\d+) passed", done.stdout)[1]) > 30


@pytest.mark.parametrize("words", commands("compare"), ids=lambda words: words[2])
def test_documented_comparisons_are_understood(words, monkeypatch):
    monkeypatch.setattr(
        sys, "argv", ["compare", "--model", "m", "--pretrained", "p", *words[words.index("compare") + 1 :]]
    )
    given = compare.options()
    assert set(given.strategies.split(",")) - {"change"} <= set(strategy.available())
    assert all(budget.isdecimal() for budget in given.budgets.split(","))


@pytest.mark.parametrize("words", commands("speed"), ids=lambda words: words[2])
def test_documented_measurements_are_understood(words):
    given = speed.parse(["--backbone", words[2], *words[words.index("speed") + 1 :]])
    assert all(speed.knob(budget) for budget in speed.numbers(given.budget, float))


@pytest.mark.parametrize("words", commands("benchmarks.scaling"), ids=lambda words: words[-1])
def test_documented_measurements_on_several_gpus_are_understood(words, monkeypatch):
    launched = run.parse_args(words[words.index("torch.distributed.run") + 1 :])
    assert (launched.module, launched.training_script) == (True, "benchmarks.scaling")
    monkeypatch.setenv("WORLD_SIZE", launched.nproc_per_node)
    assert scaling.parse(launched.training_script_args).backbone.startswith(words[2])


def test_the_tables_of_knobs_and_strategies_are_complete():
    readme = DOCUMENTS[0].read_text()
    for name in strategy.config.field_names():
        assert f"| `{name}` |" in readme
    for name in strategy.available():
        assert f"| `{name}` |" in readme
    for name in ARGUMENTS:
        assert f"| `{name}` |" in DOCUMENTS[1].read_text()


def test_links_lead_somewhere():
    for document in DOCUMENTS:
        for target in re.findall(r"\]\(([^)#:]+)[^):]*\)", document.read_text()):
            assert (document.parent / target).exists(), f"{document.name}: {target}"


@pytest.mark.parametrize("folder", [".", "image/LLaVA", "image/Qwen2-VL", "image/Qwen3-VL", "video/Video-LLaVA"])
def test_locks_hold_what_the_projects_pin(folder):
    project = tomllib.loads((ROOT / folder / "pyproject.toml").read_text())["project"]
    locked = (ROOT / folder / "requirements.lock").read_text().splitlines()
    pinned = [need for need in project["dependencies"] if "==" in need]
    assert pinned
    assert all(any(line.startswith(pin) for line in locked) for pin in pinned)
