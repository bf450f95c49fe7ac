"""The evaluation script in several processes: the file of one, after whatever befell those before."""

import json
import os
import shutil
import signal
import subprocess
import time

import pytest
from launching import ENVIRONMENT, launched, run
from test_inference import COUNT as FEW
from test_inference import DATA, FOLDER, PRUNED, ROOT, SCRIPT, command

COUNT = 7
FAULTY = ROOT / "tests/faulty.py"


def script(output, count, *more, fault=(), data=DATA):
    """The command for so many processes; fault: what `faulty.py` is to do."""
    words = command(output, *PRUNED, "--num_samples", COUNT, *more, data=data)[2:]
    return launched(count, *((FAULTY, *fault, FOLDER / SCRIPT) if fault else (SCRIPT,)), *words)


def answered(output):
    """How often each question was answered, whichever process did."""
    lines = [line for file in output.glob("pred*.json") for line in file.read_text().splitlines() if '"pred"' in line]
    return [json.loads(line)["id"] for line in lines]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The file that one process writes, and what it says of its run record but for the seconds."""
    output = tmp_path_factory.mktemp("whole")
    done = run(script(output, 1), cwd=FOLDER)
    assert done.returncode == 0, done.stderr[-2000:]
    return (output / "pred.json").read_bytes(), record(done)


def record(done):
    lines = done.stdout.splitlines()
    return [line for line in lines if line.startswith(("clse:", "multiply-adds:"))]


def finishes(output, count, whole, before):
    """The same command goes on with so many processes, answers the rest only, and leaves the file of one."""
    done = run(script(output, count), cwd=FOLDER)
    assert done.returncode == 0, done.stderr[-2000:]
    assert (output / "pred.json").read_bytes() == whole[0]
    assert f"{COUNT - before} samples (means over samples)" in done.stdout
    left = {file.name for file in output.iterdir()}
    assert left == {"pred.json", "pred.settings.json", "pred.left_out.json", "pred.lock"}
    return done


@pytest.mark.parametrize("count", [2, 3])
def test_processes_write_the_file_of_one_and_count_as_one(tmp_path, whole, count):
    assert record(finishes(tmp_path, count, whole, 0)) == whole[1]


def test_a_process_that_dies_stops_all_and_loses_nothing(tmp_path, whole):
    start = time.monotonic()
    done = run(script(tmp_path, 3, fault=("die", 1, 1)), cwd=FOLDER)
    assert time.monotonic() - start < 60
    assert done.returncode == 1
    assert "rank      : 1 (local_rank: 1)\n  exitcode  : -9" in done.stderr.split("Root Cause")[1]
    before = answered(tmp_path)
    assert 1 <= len(before) < COUNT
    assert len(before) == len(set(before))
    finishes(tmp_path, 2, whole, len(before))


def test_a_process_that_hangs_is_named_and_meanwhile_a_second_run_is_refused(tmp_path, whole):
    environment = ENVIRONMENT | {"VTR_RANK_WAIT": "20"}
    hanging = subprocess.Popen(
        script(tmp_path, 2, fault=("hang", 1, 1)), cwd=FOLDER, env=environment, stderr=subprocess.PIPE, text=True
    )
    while len(answered(tmp_path)) < 5:
        assert hanging.poll() is None
        time.sleep(0.1)
    for count in (1, 2):
        refused = run(script(tmp_path, count), cwd=FOLDER)
        assert refused.returncode == 1
        assert refused.stderr.count("pred.json: another run is writing it; wait for it, or give another name") == 1
    errors = hanging.communicate(timeout=120)[1]
    assert hanging.returncode == 1
    assert errors.count("rank 1: nothing done for 20 seconds, so all ranks stop") == 1
    assert len(answered(tmp_path)) == 5
    finishes(tmp_path, 1, whole, 5)


def test_killed_with_what_started_it_the_rest_is_answered_by_another_number(tmp_path, whole):
    process = subprocess.Popen(
        script(tmp_path, 2, fault=("hang", 1, 1)), cwd=FOLDER, env=ENVIRONMENT, stderr=subprocess.DEVNULL
    )
    while len(answered(tmp_path)) < 2:
        assert process.poll() is None
        time.sleep(0.02)
    children = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True, check=True).stdout
    for number in (process.pid, *map(int, children.split())):
        os.kill(number, signal.SIGKILL)
    process.wait()
    before = answered(tmp_path)
    assert len(before) == len(set(before))
    finishes(tmp_path, 3, whole, len(before))


def test_what_processes_leave_out_is_listed_as_by_one(tmp_path):
    data = tmp_path / "data"
    shutil.copytree(DATA, data)
    for clip in ("clip000", "clip003"):
        (data / f"videos/{clip}.mp4").write_bytes(b"broken")
    outputs = [tmp_path / str(count) for count in (1, 2)]
    for count, output in enumerate(outputs, start=1):
        done = run(script(output, count, "--num_samples", FEW, data=data), cwd=FOLDER)
        assert done.returncode == (3 if count == 1 else 1)  # whatever it is, a launcher makes a 1 of it
        assert "2 left out" in done.stderr
    for name in ("pred.json", "pred.left_out.json"):
        assert (outputs[0] / name).read_bytes() == (outputs[1] / name).read_bytes()
