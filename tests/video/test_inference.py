"""The evaluation script as it is typed: its files, its exit status, its way back after a kill."""

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
from documents import scripts
from launching import call

import strategy
import world
from strategy import options as read
from strategy import registry
from strategy.evaluation.ahead import THREAD_NAME
from videollava.eval.video import eval_video_qa, run_inference_video_qa
from videollava.eval.video.run_inference_video_qa import Answerer, parse, run_settings

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "video/Video-LLaVA"
CHECKPOINT = ROOT / "examples/shapes/checkpoints/shapes-video"
DATA = ROOT / "examples/shapes/clips_test"
SCRIPT = "videollava/eval/video/run_inference_video_qa.py"
COUNT = 4


def command(output, *more, data=DATA):
    words = [sys.executable, SCRIPT, "--model_path", CHECKPOINT, "--video_dir", data / "videos"]
    words += ["--gt_file_question", data / "test_q.json", "--gt_file_answers", data / "test_a.json"]
    words += ["--output_dir", output, "--output_name", "pred", "--num_samples", COUNT, "--device", "cpu"]
    return [str(word) for word in (*words, *more)]


PRUNED = ("--vtr_enabled", "--vtr_strategy", "clse", "--vtr_keep_tokens", "194")
ENVIRONMENT = os.environ | {"CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1"}


def run(words):
    return subprocess.run(words, cwd=FOLDER, env=ENVIRONMENT, capture_output=True, text=True, check=False)


@pytest.fixture
def run_here(monkeypatch, capsys):
    """Runs the script in this process."""
    monkeypatch.chdir(FOLDER)
    return lambda words: call(run_inference_video_qa.main, words[1:], monkeypatch, capsys)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    output = tmp_path_factory.mktemp("whole")
    done = run(command(output, *PRUNED))
    assert done.returncode == 0, done.stderr[-2000:]
    return done, (output / "pred.json").read_bytes()


def test_an_uninterrupted_run_writes_one_object_a_line(whole):
    done, data = whole
    entries = [json.loads(line) for line in data.decode().splitlines()]
    asked, known = (json.loads((DATA / f"test_{kind}.json").read_text())[:COUNT] for kind in "qa")
    assert [entry["id"] for entry in entries] == [sample["question_id"] for sample in asked]
    assert [entry["question"] for entry in entries] == [sample["question"] for sample in asked]
    assert [entry["answer"] for entry in entries] == [sample["answer"] for sample in known]
    assert [entry["pred"] for entry in entries] == [entry["answer"] for entry in entries]
    assert "prune layers [3], 2056 visual tokens kept 194" in done.stdout
    assert "accuracy=" in done.stderr


@pytest.mark.parametrize("lines", [0, 1, 3])
def test_killed_at_any_moment_it_ends_with_the_same_file(tmp_path, whole, lines):
    words = command(tmp_path, *PRUNED)
    process = subprocess.Popen(
        words, cwd=FOLDER, env=ENVIRONMENT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
    )
    file = tmp_path / "pred.json"
    while not file.exists() or file.read_bytes().count(b"\n") < lines:
        assert process.poll() is None
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert file.read_bytes().count(b"\n") < COUNT, "it was killed too late to show anything"
    done = run(words)
    assert done.returncode == 0, done.stderr[-2000:]
    assert file.read_bytes() == whole[1]


def test_what_cannot_be_answered_is_listed_and_shifts_nothing(run_here, tmp_path, whole):
    data = tmp_path / "data"
    (data / "videos").mkdir(parents=True)
    asked, known = (json.loads((DATA / f"test_{kind}.json").read_text())[:COUNT] for kind in "qa")
    for entry in asked[1:]:
        video = (DATA / "videos" / f"{entry['video_name']}.mp4").read_bytes()
        (data / "videos" / f"{entry['video_name']}.mp4").write_bytes(video if entry is not asked[2] else b"broken")
    (data / "test_q.json").write_text(json.dumps([*asked[:2], "nonsense", *asked[2:]]))
    (data / "test_a.json").write_text(json.dumps(known[::-1]))
    done = run_here(command(tmp_path / "out", *PRUNED, data=data))
    assert done.returncode == 3
    expected = whole[1].splitlines(keepends=True)
    assert (tmp_path / "out/pred.json").read_bytes() == expected[1] + expected[3]
    told = {item["video"]: item["reason"] for item in json.loads((tmp_path / "out/pred.left_out.json").read_text())}
    assert "entry 2: a str" in told[""]
    assert "no video clip000" in told["clip000"]
    assert "cannot be decoded" in told["clip002"]
    assert "3 left out" in done.stderr
    assert "left out: clip000_0 clip000: no video clip000" in done.stderr
    strict = run_here(command(tmp_path / "strict", *PRUNED, "--strict", data=data))
    assert strict.returncode == 1
    assert not threads()
    assert "entry 2: a str" in strict.stderr
    assert "Traceback" not in strict.stderr


def test_a_batch_gives_the_same_file_and_shifts_nothing(run_here, tmp_path, whole):
    done = run_here(command(tmp_path, *PRUNED, "--batch_size", 3))
    assert done.returncode == 0, done.stderr[-2000:]
    assert (tmp_path / "pred.json").read_bytes() == whole[1]
    data = tmp_path / "data"
    shutil.copytree(DATA, data)
    (data / "videos/clip001.mp4").write_bytes(b"broken")
    done = run_here(command(tmp_path / "out", *PRUNED, "--batch_size", 3, data=data))
    assert done.returncode == 3
    lines = whole[1].splitlines(keepends=True)
    assert (tmp_path / "out/pred.json").read_bytes() == lines[0] + lines[2] + lines[3]


def threads():
    return [thread for thread in threading.enumerate() if thread.name.startswith(THREAD_NAME)]


@pytest.mark.parametrize("workers", [0, 1, 3])
def test_the_next_videos_are_prepared_by_other_threads_and_the_file_is_the_same(
    run_here, tmp_path, whole, monkeypatch, workers
):
    prepare, answer, here = Answerer.prepare, Answerer.__call__, threading.current_thread()
    prepared, begun, asked, readers = threading.Semaphore(0), [], [], set()

    def prepared_here(self, sample):
        begun.append(sample.id)
        readers.add(threading.current_thread())
        result = prepare(self, sample)
        prepared.release()
        return result

    def answered_here(self, ready):
        asked.append(threading.current_thread())
        if len(asked) == 1:
            for _ in range(1 + workers):
                assert prepared.acquire(timeout=60)
        assert len(begun) <= len(asked) + workers
        return answer(self, ready)

    monkeypatch.setattr(Answerer, "prepare", prepared_here)
    monkeypatch.setattr(Answerer, "__call__", answered_here)
    done = run_here(command(tmp_path, *PRUNED, "--prepare_ahead", workers))
    assert done.returncode == 0, done.stderr[-2000:]
    assert (tmp_path / "pred.json").read_bytes() == whole[1]
    assert asked == [here] * COUNT
    assert (here in readers) == (workers == 0)
    assert not threads()


@pytest.mark.parametrize("error", [KeyboardInterrupt, torch.OutOfMemoryError])
def test_what_ends_the_script_loses_no_answer_and_leaves_no_thread(run_here, tmp_path, whole, monkeypatch, error):
    answer, asked = Answerer.__call__, []

    def interrupted(self, ready):
        asked.append(ready)
        if len(asked) == 3:
            raise error
        return answer(self, ready)

    with monkeypatch.context() as patched:
        patched.setattr(Answerer, "__call__", interrupted)
        with pytest.raises(error):
            run_here(command(tmp_path, *PRUNED, "--prepare_ahead", 3))
    assert not threads()
    lines = whole[1].splitlines(keepends=True)
    assert (tmp_path / "pred.json").read_bytes() == b"".join(lines[:2])
    assert run_here(command(tmp_path, *PRUNED, "--prepare_ahead", 1)).returncode == 0
    assert (tmp_path / "pred.json").read_bytes() == whole[1]


def test_chunks_join_and_a_changed_budget_is_refused(run_here, tmp_path, whole):
    for number in (1, 0):
        done = run_here(command(tmp_path, *PRUNED, "--num_chunks", 2, "--chunk_idx", number))
        assert done.returncode == 0, done.stderr[-2000:]
    assert (tmp_path / "pred.json").read_bytes() == whole[1]
    words = command(tmp_path, "--num_chunks", 2, "--vtr_enabled", "--vtr_keep_tokens", 32)
    refused = run_here(words)
    assert refused.returncode == 1
    assert "keep_tokens was [194], is [32]" in refused.stderr
    assert "Traceback" not in refused.stderr


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (("--vtr_enabled", "--vtr_keep_tokens", "many"), "keep_tokens='many'"),
        (("--model_base", "somewhere"), "LoRA checkpoints are not supported"),
        (("--model_max_length", "100"), "the prompt has"),
        (("--num_chunks", "2", "--chunk_idx", "2"), "chunk_idx goes from 0"),
        (("--batch_size", "0"), "allowed is a whole number from 1 up"),
        (("--prepare_ahead", "-1"), "--prepare_ahead -1: allowed is a whole number from 0 up"),
    ],
)
def test_a_wrong_argument_is_one_sentence(run_here, tmp_path, more, words):
    done = run_here(command(tmp_path, "--strict", *more))
    assert done.returncode == 1
    assert f"run_inference_video_qa: {'question' if 'prompt' in words else ''}" in done.stderr
    assert words in done.stderr
    assert "Traceback" not in done.stderr


def test_the_unpruned_baseline_is_right(run_here, tmp_path):
    done = run_here(command(tmp_path, "--vtr_enabled", "False"))
    assert done.returncode == 0, done.stderr[-2000:]
    assert "unpruned: unpruned, 2056 visual tokens," in done.stdout
    entries = [json.loads(line) for line in (tmp_path / "pred.json").read_text().splitlines()]
    assert [entry["pred"] for entry in entries] == [entry["answer"] for entry in entries]


README = (FOLDER / "README.md").read_text()


def documented():
    blocks = re.findall(r"^```\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)
    lines = [line for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    return [shlex.split(line) for line in lines if line.startswith("python")]


def test_documented_commands_are_understood(monkeypatch):
    seen = set()
    for _, script, *words in documented():
        assert (FOLDER / script).is_file()
        seen.add(script)
        if script == SCRIPT:
            options = parse(words)
            assert options.num_samples == 500
        else:
            assert eval_video_qa.parse(words)[1].pred_path
    assert len(seen) == 2


def test_commands_documented_from_the_root_are_understood():
    for script, words in scripts("run_inference_video_qa.py"):
        assert (ROOT / script).is_file()
        assert parse(words).vtr_keep_tokens == "64"
    for script, words in scripts("eval_video_qa.py"):
        assert (ROOT / script).is_file()
        assert eval_video_qa.parse(words)[1].pred_path


def test_every_flag_is_in_the_table():
    usage = subprocess.run([sys.executable, SCRIPT, "--help"], cwd=FOLDER, capture_output=True, text=True, check=True)
    flags = set(re.findall(r"^  (--\w+)", usage.stdout, re.MULTILINE))
    assert {f"--vtr_{name}" for name in strategy.config.field_names()} < flags
    row = r"^\|.*`{}`.*\|.*\|.*\|$"
    assert not [flag for flag in flags if not re.search(row.format(flag), README, re.MULTILINE)]


def test_the_table_says_of_each_option_what_its_declaration_says():
    users = strategy.config.strategy_options()
    lacking = []
    for name, (default, sentence) in strategy.config.describe_options().items():
        used = f" For {', '.join(f'`{user}`' for user in users[name])}." if name in users else ""
        # The script prunes only if asked, and some defaults are the strategy's.
        shown = "`False`; the flag alone: `True`" if name == "enabled" else "" if default is None else f"`{default}`"
        row = f"| `--vtr_{name}` | {sentence + used} | {shown} |".replace("|  |", "| |")
        if README.splitlines().count(row) != 1:
            lacking.append(row)
    assert not lacking, "\n".join(["video/Video-LLaVA/README.md lacks:", *lacking])


def test_a_new_option_is_a_flag_and_reaches_the_configuration(monkeypatch, capsys):
    @dataclass(frozen=True, init=False)
    class Own(strategy.Options):
        sharpness: float = strategy.option(0.5, read.positive, "How sharp, in % of `nothing`.")
        blunt: bool = strategy.option(False, read.flag, "Whether it is blunt.")

    class Sharp(strategy.Strategy):
        options_type = Own

    monkeypatch.setitem(registry._strategies, "sharp", Sharp)
    words = command("out", "--vtr_enabled", "--vtr_strategy", "sharp", "--vtr_sharpness", "2", "--vtr_blunt")[2:]
    config = strategy.VTRConfig.take(dict(vars(parse(words))))
    assert (config.enabled, config.sharpness, config.blunt) == (True, 2.0, True)
    with pytest.raises(SystemExit):
        parse(["--help"])
    usage = " ".join(capsys.readouterr().out.split())
    assert "How sharp, in % of nothing. For sharp. (default: 0.5)" in usage
    with pytest.raises(ValueError, match="sharpness='2': strategy=clse does not use it"):
        strategy.VTRConfig.take(dict(vars(parse(command("out", "--vtr_sharpness", "2")[2:]))))


@pytest.mark.parametrize("reason", ["the model is being trained", None])
def test_decisions_about_graphs_follow_the_summary(monkeypatch, capsys, tmp_path, reason):
    record, answers = strategy.RunRecord("clse", 4, None), Mock(done={}, file=tmp_path / "pred.json")
    if reason:
        record.decide("answer", "stock loop", reason)
    monkeypatch.setattr(run_inference_video_qa, "run", lambda options: (answers, [], record))
    monkeypatch.setattr(sys, "argv", command(tmp_path)[1:])
    assert run_inference_video_qa.main() == 0
    said = capsys.readouterr().out
    assert said.startswith(record.summary())
    lines = ["decisions of the graph engine:", f"1 x answer: stock loop ({reason})"] if reason else []
    assert said.removeprefix(record.summary()).splitlines()[1:-1] == lines


def test_documented_python_runs():
    [block] = re.findall(r"^```python\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)
    names = {}
    exec(compile(block, "README.md", "exec"), names)
    text, summary = names["answer"](DATA / "videos/clip000.mp4", "Which shape appears first?", str(CHECKPOINT))
    assert text in world.SHAPES
    assert "clse: prune layers [3], 2056 visual tokens kept 194" in summary


def test_runs_with_another_engine_or_other_threads_share_their_answers_and_others_do_not(tmp_path):
    options = parse(command(tmp_path)[2:])
    settings = lambda **own: run_settings(options, strategy.VTRConfig(**own))  # noqa: E731
    other = parse(command(tmp_path, "--prepare_ahead", options.prepare_ahead + 1)[2:])
    assert run_settings(other, strategy.VTRConfig()) == settings()
    assert settings(engine="graph") == settings(engine="eager")
    assert settings(enabled=False, engine="graph") == settings(enabled=False)
    assert settings(keep_tokens=64) != settings(keep_tokens=194)
