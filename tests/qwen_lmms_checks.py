"""What both Qwen wrappers for lmms-eval owe: the arguments as typed, stock answers, named errors.

The tests of a backbone import everything from here and give a fixture `wrapper`, a `Wrapper`. No trained
checkpoint is needed: an untrained one, in the stock format, answers nonsense the same way each time.
"""

import inspect
import json
import os
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from datasets import load_dataset
from documents import DOCUMENTS, blocks, evaluations
from lmms_eval.__main__ import parse_eval_args
from lmms_eval.evaluator import simple_evaluate
from lmms_eval.models import get_model
from lmms_eval.tasks import TaskManager
from lmms_eval.utils import simple_parse_args_string
from qwen_vl_utils.vision_process import smart_resize

import strategy

ROOT = Path(__file__).parents[1]
TASKS = ROOT / "examples/shapes/tasks"
QUESTIONS = load_dataset("parquet", data_files={"test": str(TASKS / "shapes_varied_test.parquet")})["test"]


@dataclass(frozen=True)
class Wrapper:
    """A pruned model, the stock one it extends, an untrained checkpoint, and the pixels of a visual token's side."""

    name: str
    stock: str
    checkpoint: Path
    cell: int

    def load(self, knobs, name=None, **options):
        arguments = f"pretrained={self.checkpoint},device=cpu,device_map=cpu,{knobs}"
        return get_model(name or self.name, **options).create_from_arg_string(arguments)


def answers(lm, name, limit=6):
    manager = TaskManager(include_path=str(TASKS), model_name=name)
    results = simple_evaluate(
        model=lm, tasks=["shapes_varied"], task_manager=manager, limit=limit, log_samples=True, batch_size=1
    )
    return [sample["filtered_resps"] for sample in results["samples"]["shapes_varied"]]


@pytest.mark.parametrize(
    ("knobs", "layers", "kept"),
    [
        ("vtr_strategy=clse,vtr_retain_ratio=0.334", (1, 4, 8), (173, 109, 29)),
        ("strategy=clse,keep_tokens=192", (1, 4, 8), (173, 109, 29)),
        ("vtr_keep_tokens=64,vtr_prune_layer=1;5;9,vtr_ref_layers=0", (1, 5, 9), (57, 36, 10)),
        ("strategy=random,retain_ratio=0.223,prune_layer=[2,5,9],ref_layers=[1]", (2, 5, 9), (115, 72, 20)),
        ("vtr_clse_cutoff_ratio=0.2,vtr_clse_temp=0.05", (1, 4, 8), (173, 109, 29)),
    ],
)
def test_the_knobs_work_as_typed(wrapper, knobs, layers, kept):
    plan = wrapper.load(knobs).record.plan
    assert (plan.layers, plan.kept(304)) == (layers, kept)


def test_every_argument_of_the_stock_wrapper_is_taken(wrapper):
    stock = inspect.signature(get_model(wrapper.stock).__init__).parameters.values()
    defaults = {p.name: p.default for p in stock if p.default is not p.empty and p.default is not None}
    given = defaults | {"pretrained": str(wrapper.checkpoint), "device": "cpu", "device_map": "cpu", "batch_size": 2}
    lm = get_model(wrapper.name)(**given, vtr_enabled="False")
    assert (lm.batch_size, lm.max_num_frames, lm.record.plan) == (2, defaults["max_num_frames"], None)


def test_the_device_is_chosen_and_the_cpu_computes_in_float32(wrapper):
    lm = get_model(wrapper.name).create_from_arg_string(f"pretrained={wrapper.checkpoint}")
    on_gpu = torch.cuda.is_available()
    assert lm.model.device.type == ("cuda" if on_gpu else "cpu")
    assert on_gpu or lm.model.dtype == torch.float32


def test_disabled_it_answers_as_the_stock_wrapper(wrapper):
    stock = wrapper.load("", name=wrapper.stock)
    stock.model.float()
    assert answers(wrapper.load("vtr_enabled=False"), wrapper.name) == answers(stock, wrapper.stock)


def test_each_picture_keeps_its_share_of_its_own_tokens(wrapper):
    lm = wrapper.load("retain_ratio=0.334")
    sizes = []
    for row in QUESTIONS.select(range(6)):
        height, width = smart_resize(
            row["image"].height, row["image"].width, wrapper.cell, int(lm.min_pixels), int(lm.max_pixels)
        )
        sizes.append(height // wrapper.cell * (width // wrapper.cell))
    assert len(set(sizes)) > 1
    record = lm.record
    answers(lm, wrapper.name)
    means = record.means()
    assert means["visual_tokens"] == pytest.approx(sum(sizes) / 6)
    expected = [sum(int(share * size) for size in sizes) / 6 for share in (0.57, 0.36, 0.098)]
    assert list(means["kept_tokens"]) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("knobs", "words"),
    [
        ("keep_token=192", "unknown argument 'keep_token': did you mean 'keep_tokens'"),
        ("min_pixel=192", "unknown argument 'min_pixel': did you mean 'min_pixels'"),
        ("vtr_keep_tokens=192,vtr_retain_ratio=0.3", "give one of the two"),
        ("vtr_prune_layer=1;5;12", "the decoder has 12 layers"),
        ("vtr_strategy=nothing", "strategy='nothing': allowed are"),
    ],
)
def test_a_wrong_argument_is_one_sentence(wrapper, knobs, words):
    with pytest.raises(SystemExit) as stop:
        wrapper.load(knobs)
    assert str(stop.value).startswith(f"{wrapper.name}: ")
    assert words in str(stop.value)


def spoil_nothing_there(folder):
    for file in folder.iterdir():
        file.unlink()


def spoil_weights(folder):
    weights = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(weights[: len(weights) // 2])


def spoil_config(folder):
    (folder / "config.json").write_text('{"model_type": ')


def spoil_with_code(folder):
    config = json.loads((folder / "config.json").read_text())
    config["auto_map"] = {"AutoConfig": "trap.Config"}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "trap.py").write_text(f"open({str(folder / 'sprung')!r}, 'w')\nclass Config: pass\n")


@pytest.mark.parametrize("spoil", [spoil_nothing_there, spoil_weights, spoil_config, spoil_with_code])
def test_a_broken_checkpoint_ends_with_its_name_and_runs_no_code(wrapper, tmp_path, spoil):
    for file in wrapper.checkpoint.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    spoil(tmp_path)
    with pytest.raises(SystemExit) as stop:
        get_model(wrapper.name)(pretrained=str(tmp_path), device="cpu")
    assert str(stop.value).startswith(f"{wrapper.name}: ")
    assert str(tmp_path) in str(stop.value)
    assert not (tmp_path / "sprung").exists()


def test_the_command_line_writes_results_and_says_what_was_kept(wrapper, tmp_path):
    command = [sys.executable, "-m", "lmms_eval", "--model", wrapper.name]
    command += ["--model_args", f"pretrained={wrapper.checkpoint},vtr_strategy=clse,vtr_retain_ratio=0.334"]
    command += ["--tasks", "shapes_varied", "--include_path", str(TASKS), "--limit", "2", "--batch_size", "1"]
    command += ["--output_path", str(tmp_path / "results")]
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert f"{wrapper.name} clse: prune layers [1, 4, 8]" in done.stdout + done.stderr
    [results] = (tmp_path / "results").rglob("*results.json")
    assert json.loads(results.read_text())["results"]["shapes_varied"]["accuracy,none"] >= 0


def test_the_documents_are_understood_and_complete(wrapper, monkeypatch):
    allowed = set(inspect.signature(get_model(wrapper.stock).__init__).parameters)
    for words in evaluations(wrapper.name):
        monkeypatch.setattr(sys, "argv", ["lmms_eval", *words])
        _, options = parse_eval_args()
        arguments = simple_parse_args_string(options.model_args)
        strategy.VTRConfig.take(arguments)
        assert set(arguments) <= allowed
        assert set(options.tasks.split(",")) <= set(TaskManager(include_path=str(TASKS)).all_tasks)
    [readme] = [d.read_text() for d in DOCUMENTS if f"The package `{wrapper.name}`" in d.read_text()]
    for name in allowed - {"self", "kwargs"}:
        assert re.search(rf"^\|.*`{name}`.*\|.*\|.*\|$", readme, re.MULTILINE), name


def test_documented_python_runs(wrapper):
    [block] = [block for _, block in blocks("python") if f"import {wrapper.name}" in block]
    documented = {}
    exec(compile(block, "README.md", "exec"), documented)
    lm = wrapper.load("enabled=False")
    strategy.detach(lm.model)
    picture = QUESTIONS[0]["image"]
    message = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": QUESTIONS[0]["question"]}]}]
    text = lm.processor.apply_chat_template(message, tokenize=False, add_generation_prompt=True)
    ids, summary = documented["answer"](lm.model, lm.processor(text=[text], images=[picture], return_tensors="pt"))
    assert ids.shape[0] == 1
    assert "clse: prune layers [1, 4, 8]" in summary
