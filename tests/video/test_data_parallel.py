"""The evaluation script in several processes: the file of one, after whatever befell those before."""

import json
import shutil
import subprocess
import time

import psutil
import pytest
from accelerate.commands.launch import launch_command_parser
from documents import launches
from launching import ENVIRONMENT, launched, run
from test_inference import DATA, FOLDER, PRUNED, ROOT, SCRIPT, command

from videollava.eval.video.run_inference_video_qa import parse

pytestmark = pytest.mark.processes
COUNT = 12
FAULTY = ROOT / "tests/faulty.py"


def script(output, count, *more, fault=(), data=DATA):
    """The command for so many processes; fault: what `faulty.py` is to do."""
    words = command(output, *PRUNED, "--num_samples", COUNT, *more, data=data)[2:]
    return launched(count, *((FAULTY, *fault, FOLDER / SCRIPT) if fault else (SCRIPT,)), *words)


def answered(output):
    """The questions answered, as often as they were, by whichever process."""
    lines = [line for file in output.glob("pred*.json") for line in file.read_text().splitlines() if '"pred"' in line]
    return [json.loads(line)["id"] for line in lines]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The file that one process writes, and what it says of its run record but for the seconds."""
    output = tmp_path_factory.mktemp("whole")
    done = run(script(output, 1), cwd=FOLDER)
    assert done.returncode == 0, done.stderr[-8000:]
    return (output / "pred.json").read_bytes(), record(done)


def record(done):
    lines = done.stdout.splitlines()
    return [line for line in lines if line.startswith(("clse:", "multiply-adds:"))]


def finishes(output, count, whole, before):
    """The same command goes on with so many processes, answers the rest only, and leaves the file of one."""
    done = run(script(output, count), cwd=FOLDER)
    assert done.returncode == 0, done.stderr[-8000:]
    assert (output / "pred.json").read_bytes() == whole[0]
    assert f"{COUNT - before} samples (means over samples)" in done.stdout
    left = {file.name for file in output.iterdir()}
    assert left == {"pred.json", "pred.settings.json", "pred.left_out.json", "pred.lock"}
    return done


def test_processes_write_the_file_of_one_and_count_as_one(tmp_path, whole):
    assert record(finishes(tmp_path, 3, whole, 0)) == whole[1]


def test_a_second_run_is_refused_and_whatever_dies_the_rest_is_answered_by_another_number_of_processes(tmp_path, whole):
    start = time.monotonic()
    done = run(script(tmp_path, 3, fault=("die", 1, 1)), cwd=FOLDER)
    assert time.monotonic() - start < 60
    assert done.returncode == 1
    assert "rank      : 1 (local_rank: 1)\n  exitcode  : -9" in done.stderr.split("Root Cause")[1]
    before = answered(tmp_path)
    assert 1 <= len(before) < COUNT
    # One that hangs, so that this is not over before a second one is refused, and it is killed with what started it.
    words = script(tmp_path, 2, fault=("hang", 1, 0))
    process = subprocess.Popen(words, cwd=FOLDER, env=ENVIRONMENT, stderr=subprocess.DEVNULL)
    file = tmp_path / "pred.json"
    while file.read_bytes().count(b"\n") <= len(before):  # the first process's, after all that was there before
        assert process.poll() is None
        time.sleep(0.02)
    refused = run(script(tmp_path, 2), cwd=FOLDER)
    assert refused.returncode == 1
    assert refused.stderr.count("pred.json: another run is writing it; wait for it, or give another name") == 1
    for each in (*psutil.Process(process.pid).children(), process):
        each.kill()
    process.wait()
    after = answered(tmp_path)
    assert len(before) < len(after) < COUNT
    assert len(after) == len(set(after))
    finishes(tmp_path, 1, whole, len(after))


def test_a_process_that_hangs_is_named(tmp_path, whole):
    done = run(script(tmp_path, 2, fault=("hang", 1, 1)), wait=15, cwd=FOLDER)
    assert done.returncode == 1
    assert done.stderr.count("rank 1: nothing done for 15 seconds, so all ranks stop") == 1
    assert len(answered(tmp_path)) == COUNT // 2 + 1
    finishes(tmp_path, 1, whole, COUNT // 2 + 1)


def test_what_processes_leave_out_is_listed_as_by_one(tmp_path, whole):
    data = tmp_path / "data"
    shutil.copytree(DATA, data)
    broken = ["clip003", "clip000"]
    for clip in broken:
        (data / f"videos/{clip}.mp4").write_bytes(b"broken")
    done = run(script(tmp_path, 2, data=data), cwd=FOLDER)
    assert done.returncode == 1  # it is 3, of which a launcher makes a 1
    assert "2 left out" in done.stderr
    kept = [line for number, line in enumerate(whole[0].splitlines(keepends=True)) if number not in (0, 3)]
    assert (tmp_path / "pred.json").read_bytes() == b"".join(kept)
    listed = json.loads((tmp_path / "pred.left_out.json").read_text())
    assert [item["video"] for item in listed] == sorted(broken)


def test_the_documented_launches_are_understood():
    for words in launches(f"{FOLDER.relative_to(ROOT)}/{SCRIPT}"):
        options = launch_command_parser().parse_args(words)
        assert (ROOT / options.training_script).is_file()
        assert options.num_processes == 8
        assert parse(options.training_script_args).vtr_keep_tokens == "64"
