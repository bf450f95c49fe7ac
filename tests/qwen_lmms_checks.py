"""What both Qwen wrappers for lmms-eval owe: the arguments as typed, stock answers, named errors.

The tests of a backbone import everything from here and give a fixture `wrapper`, a `lmms_checks.Wrapper`.
"""

import inspect
import json
import re
import subprocess
import sys

import pytest
import torch
from documents import DOCUMENTS, blocks, evaluations
from lmms_checks import (
    CHECKPOINTS,
    ENVIRONMENT,
    LMMS_EVAL,
    ROOT,
    TASKS,
    Wrapper,
    ask,
    asked,
    measured_is_shown_and_saved,
    task_manager,
)
from lmms_eval.__main__ import parse_eval_args
from lmms_eval.models import get_model
from lmms_eval.utils import simple_parse_args_string
from PIL import Image
from qwen_vl_utils.vision_process import smart_resize

import strategy
from qwen_vl_vtr.colours import ColourBatch

CLIPS = ROOT / "examples/shapes/clips_test/videos"
STOCK = """
import json, sys
from datasets import load_dataset
from transformers import AutoModelForImageTextToText, AutoProcessor

checkpoint, data = sys.argv[1:]
processor, model = AutoProcessor.from_pretrained(checkpoint), AutoModelForImageTextToText.from_pretrained(checkpoint)
model.float()
answers = []
for row in load_dataset("parquet", data_files=data)["train"].select(range(10)):
    message = [{"role": "system", "content": "You are a helpful assistant."}]
    message += [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": row["question"]}]}]
    text = processor.apply_chat_template(message, tokenize=False, add_generation_prompt=True)
    inputs = processor(text=[text], images=[row["image"]], return_tensors="pt")
    new = model.generate(**inputs, max_new_tokens=8)[:, inputs["input_ids"].shape[1] :]
    answers.append(processor.batch_decode(new, skip_special_tokens=True)[0])
assert "strategy" not in sys.modules
print(json.dumps(answers))
"""


def qwen(name, stock, checkpoint, cell):
    """The fixture `wrapper` of a Qwen."""
    places = ("<image 1>", "<image 2>")
    return Wrapper(name, CHECKPOINTS / checkpoint, "shapes_varied", stock, cell, places, ",interleave_visuals=True")


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


def test_pictures_stay_bytes_until_their_batch_moves(wrapper):
    lm = wrapper.load("")
    message = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What?"}]}]
    text = lm.processor.apply_chat_template([message], add_generation_prompt=True, tokenize=False)
    for processor in (lm.processor, lm._stock_loop._copied_readers()["processor"]):
        processor.pause = lambda: None
        batch = processor(text=text, images=[Image.new("RGB", (90, 60))], return_tensors="pt")
        assert isinstance(batch, ColourBatch)


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


def test_stock_transformers_runs_the_small_checkpoint_without_this_project(wrapper):
    data = str(TASKS / "shapes_varied_test.parquet")
    command = [sys.executable, "-c", STOCK, str(wrapper.checkpoint), data]
    done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    right = [said == row["answer"] for said, row in zip(json.loads(done.stdout), wrapper.questions, strict=False)]
    assert len(right) == 10
    assert sum(right) >= 9
    assert sum(file.stat().st_size for file in wrapper.checkpoint.iterdir()) < 16e6


def test_disabled_it_answers_as_the_stock_wrapper(wrapper):
    stock = wrapper.load("device_map=cpu", name=wrapper.stock)
    stock.model.float()
    assert wrapper.answers(wrapper.load("vtr_enabled=False"), 6) == wrapper.answers(stock, 6, wrapper.stock)


def test_each_picture_keeps_its_share_of_its_own_tokens(wrapper):
    lm = wrapper.load("retain_ratio=0.334")
    sizes = []
    for row in wrapper.questions.select(range(6)):
        height, width = smart_resize(
            row["image"].height, row["image"].width, wrapper.cell, int(lm.min_pixels), int(lm.max_pixels)
        )
        sizes.append(height // wrapper.cell * (width // wrapper.cell))
    assert len(set(sizes)) > 1
    record = lm.record
    wrapper.answers(lm, 6)
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
        ("resume_folder=", "resume_folder= is empty: name a folder"),
        ("resume_folder=/dev/null", "resume_folder=/dev/null: no folder can be made there"),
        ("prepare_ahead=many", "prepare_ahead='many': allowed is a whole number from 0 up"),
        ("downsample=0", "downsample=0: allowed is a whole number from 1 up"),
        ("zero_stage=3", "zero_stage=3: want several processes started together, not 1"),
        ("tensor_parallel=2", "tensor_parallel=2: want 2 processes started together or a multiple of it, not 1"),
        ("vtr_keep_ratio=0.2,vtr_retain_ratio=0.2", "keep_ratio and retain_ratio are the same argument"),
        ("vtr_strategy=fastv,vtr_query_aggregation=last", "query_aggregation='last': strategy=fastv does not use it"),
    ],
)
def test_a_wrong_argument_is_one_sentence(wrapper, knobs, words):
    with pytest.raises(SystemExit) as stop:
        wrapper.load(knobs)
    assert str(stop.value).startswith(f"{wrapper.name}: ")
    assert words in str(stop.value)


@pytest.mark.parametrize("device", ["gpu", "cuda:x"])
def test_a_device_there_is_not_is_one_sentence(wrapper, device):
    with pytest.raises(SystemExit, match=f"device='{device}': allowed are cpu, cuda, cuda:1"):
        get_model(wrapper.name).create_from_arg_string(f"pretrained={wrapper.checkpoint},device={device}")


def test_several_rounds_are_refused_where_answers_would_be_shared_or_kept(wrapper, tmp_path):
    kept = wrapper.load(f"resume_folder={tmp_path}")
    with pytest.raises(SystemExit, match="several rounds do not go with tensor_parallel, zero_stage or resume_folder"):
        kept.generate_until_multi_round([])


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


class Trap:
    def __init__(self, trace):
        self.trace = trace

    def __reduce__(self):
        return open, (str(self.trace), "w")


def spoil_with_a_pickle(folder):
    (folder / "model.safetensors").unlink()
    torch.save({"model.norm.weight": Trap(folder / "sprung")}, folder / "pytorch_model.bin")


def spoil_size(part, **values):
    def spoil(folder):
        config = json.loads((folder / "config.json").read_text())
        config[part] |= values
        (folder / "config.json").write_text(json.dumps(config))

    return spoil


SPOILED = {
    "nothing there": spoil_nothing_there,
    "weights": spoil_weights,
    "config": spoil_config,
    "code": spoil_with_code,
    "a pickle": spoil_with_a_pickle,
    "text layers": spoil_size("text_config", num_hidden_layers=10**9),
    "vision layers": spoil_size("vision_config", depth=10**9),
    "vocabulary": spoil_size("text_config", vocab_size=10**12),
    "missing layers": spoil_size("vision_config", depth=7),
}


@pytest.mark.parametrize("spoil", SPOILED.values(), ids=SPOILED)
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
    command = [sys.executable, LMMS_EVAL, "--model", wrapper.name]
    options = f"vtr_strategy=clse,vtr_retain_ratio=0.334{wrapper.rightly}"
    command += ["--model_args", f"pretrained={wrapper.checkpoint},{options}"]
    command += ["--tasks", "shapes_varied", "--include_path", str(TASKS), "--limit", "5", "--batch_size", "1"]
    command += ["--output_path", str(tmp_path / "results")]
    done = subprocess.run(command, cwd=tmp_path, env=ENVIRONMENT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert f"{wrapper.name} clse: prune layers [1, 4, 8]" in done.stdout + done.stderr
    [results] = (tmp_path / "results").rglob("*results.json")
    saved = json.loads(results.read_text())
    assert saved["results"]["shapes_varied"]["accuracy,none"] > 0.5
    measured_is_shown_and_saved(saved, done.stdout)


def test_the_documents_are_understood_and_complete(wrapper, monkeypatch):
    allowed = {
        "tensor_parallel",
        "zero_stage",
        "prepare_ahead",
        *inspect.signature(get_model(wrapper.stock).__init__).parameters,
    }
    for words in evaluations(wrapper.name):
        monkeypatch.setattr(sys, "argv", ["lmms_eval", *words])
        _, options = parse_eval_args()
        arguments = simple_parse_args_string(options.model_args)
        strategy.VTRConfig.take(arguments)
        assert set(arguments) <= allowed
        assert set(options.tasks.split(",")) <= set(task_manager(wrapper.name).all_tasks)
    [readme] = [d.read_text() for d in DOCUMENTS if f"The package `{wrapper.name}`" in d.read_text()]
    for name in allowed - {"self", "kwargs"}:
        assert re.search(rf"^\|.*`{name}`.*\|.*\|.*\|$", readme, re.MULTILINE), name


def test_documented_python_runs(wrapper):
    [block] = [block for _, block in blocks("python") if f"import {wrapper.name}" in block]
    documented = {}
    exec(compile(block, "README.md", "exec"), documented)
    lm = wrapper.load("enabled=False")
    strategy.detach(lm.model)
    picture, question = wrapper.questions[0]["image"], wrapper.questions[0]["question"]
    message = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question}]}]
    text = lm.processor.apply_chat_template(message, tokenize=False, add_generation_prompt=True)
    ids, summary = documented["answer"](lm.model, lm.processor(text=[text], images=[picture], return_tensors="pt"))
    assert ids.shape[0] == 1
    assert "clse: prune layers [1, 4, 8]" in summary


def test_tasks_whose_questions_have_the_same_numbers_share_no_batch(wrapper):
    rows = wrapper.questions
    splits = {"one": rows.select(range(3)), "two": rows.select(range(3, 8))}
    said = []
    for batch in (1, 8):
        lm = wrapper.load(f"enabled=False,batch_size={batch}", force_simple=True)
        requests = [request for task, split in splits.items() for request in asked(split, task)]
        lm.task_dict = {task: {"test": split} for task, split in splits.items()}
        said.append(lm.generate_until(requests))
    assert said[0] == said[1]
    assert sum(answer == row["answer"] for answer, row in zip(said[0], rows, strict=False)) >= 7


def test_videos_in_any_batch(wrapper):
    documents = [{"question": "Which shape appears first?", "video": str(CLIPS / f"clip00{n}.mp4")} for n in range(3)]
    said, sums = [], []
    for batch in (1, 3):
        lm = wrapper.load(f"retain_ratio=0.334,batch_size={batch}", force_simple=True)
        said.append(ask(lm, documents, lambda document: [document["video"]]))
        sums.append((lm.record.samples, lm.record.visual_sum, lm.record.kept_sum))
    assert said[0] == said[1]
    assert sums[0] == sums[1]
    assert sums[0][0] == 3
    assert sums[0][1] > 3 * 8 * 8
