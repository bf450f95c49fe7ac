"""Whatever the documents tell people to type is run here, or parsed by what would run it."""

import re
import shlex
import sys

import pytest
import tomllib
import torch
from documents import COMMANDS, DOCUMENTS, ROOT, blocks, evaluations
from lmms_eval.__main__ import parse_eval_args
from lmms_eval.tasks import TaskManager
from lmms_eval.utils import simple_parse_args_string
from transformers import LlamaConfig, LlamaModel

import demo
import strategy
import training
from llava.lmms_eval_model import ARGUMENTS


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
    for document, block in blocks("python"):
        if document.parent.parent.name in ("image", "video"):  # has a test of its own, in its own environment
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


def test_the_demo_prints_its_table(tmp_path, monkeypatch, capsys):
    checkpoint = str(ROOT / "examples/shapes/checkpoints/shapes-llava")
    words = ["demo.py", "--model", "llava_vtr", "--checkpoint", checkpoint, "--limit", "3", "--output", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", words)
    demo.main()
    table = (tmp_path / "demo_llava_vtr.md").read_text()
    assert table in capsys.readouterr().out
    assert all(f"|{kept}" in table for kept in ("330/210/62", "220/140/41", "110/70/20"))


def test_the_tables_of_knobs_and_strategies_are_complete():
    readme = DOCUMENTS[0].read_text()
    for name in strategy.config.field_names():
        assert f"| `{name}` |" in readme
    for name in set(strategy.available()) - {"attention"}:
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
