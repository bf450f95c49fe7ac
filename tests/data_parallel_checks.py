"""What several processes owe: each lmms-eval model answers as one process does, and all count as one.

What the processes do is the same code for all backbones, so each one tries its share of the ways to start them, and to
lose one.

The tests of a backbone import everything from here and give a fixture `wrapper`, a `lmms_checks.Wrapper`.
"""

import json
import sys

import pytest
from accelerate.commands.launch import launch_command_parser
from documents import launches
from launching import launched, run
from lmms_checks import LMMS_EVAL, ROOT, TASKS, task_manager
from lmms_eval.evaluator import simple_evaluate

pytestmark = pytest.mark.processes
TYPED = ("-m", "lmms_eval")
LIMIT = 5  # which neither two nor three processes share evenly
KNOBS = "strategy=clse,keep_tokens=64"
FAULTY = ROOT / "tests/faulty.py"


def counted(throughput):
    """What does not depend on how fast it went."""
    return {
        name: value for name, value in throughput.items() if not any(w in name for w in ("seconds", "time", "speed"))
    }


def by_number(samples):
    return {sample["doc_id"]: "".join(sample["filtered_resps"]) for sample in samples}


@pytest.fixture(scope="module")
def single(wrapper):
    """The answers of one process by question, and what it counted."""
    results = simple_evaluate(
        model=wrapper.load(KNOBS),
        tasks=[wrapper.task],
        task_manager=task_manager(wrapper.name),
        limit=LIMIT,
        log_samples=True,
        batch_size=1,
    )
    return by_number(results["samples"][wrapper.task]), counted(results["throughput"])


def evaluation(wrapper, output, *more):
    words = ["--model", wrapper.name, "--model_args", ",".join((f"pretrained={wrapper.checkpoint}", KNOBS, *more))]
    words += ["--tasks", wrapper.task, "--include_path", TASKS, "--limit", LIMIT, "--batch_size", 1]
    return [*words, "--output_path", output, "--log_samples"]


@pytest.mark.shared
@pytest.mark.parametrize(
    ("count", "start", "more"), [(2, TYPED, ()), (2, (LMMS_EVAL,), ("zero_stage=3",)), (3, (LMMS_EVAL,), ())]
)
def test_processes_answer_and_count_as_one(wrapper, single, tmp_path, count, start, more):
    done = run(launched(count, *start, *evaluation(wrapper, tmp_path, *more)))
    assert done.returncode == 0, done.stderr[-8000:]
    [samples] = tmp_path.rglob("*_samples_*.jsonl")
    [results] = tmp_path.rglob("*_results.json")
    answers, record = single
    assert by_number(map(json.loads, samples.read_text().splitlines())) == answers
    assert len(answers) == LIMIT
    assert counted(json.loads(results.read_text())["throughput"]) == record
    told = done.stdout + done.stderr
    assert told.count(f"{wrapper.name} clse: prune layers [1, 4, 8]") == 1
    assert f"{LIMIT} samples (means over samples)" in told


@pytest.mark.shared
@pytest.mark.parametrize(
    ("question", "then", "more"), [(1, 3, ()), (1, 3, ("zero_stage=3",)), (3, 2, ("tensor_parallel=2",))]
)
def test_after_a_process_died_others_go_on_from_the_answers_that_were_made(
    wrapper, single, tmp_path, question, then, more
):
    folder = tmp_path / "answers"
    words = evaluation(wrapper, tmp_path, f"resume_folder={folder}", *more)
    done = run(launched(2, FAULTY, "die", 1, question, "lmms_eval", *words))
    assert done.returncode
    assert "so all ranks stop" not in done.stderr, done.stderr[-8000:]  # the launcher names the one that died
    made = sum(len(file.read_text().splitlines()) for file in folder.glob("*.jsonl"))
    assert 1 <= made < LIMIT
    done = run(launched(then, LMMS_EVAL, *words))
    assert done.returncode == 0, done.stderr[-8000:]
    [samples] = tmp_path.rglob("*_samples_*.jsonl")
    assert by_number(map(json.loads, samples.read_text().splitlines())) == single[0]
    told = done.stdout + done.stderr
    assert f"{LIMIT - made} samples (means over samples)" in told
    assert f"{made} more questions were answered by an earlier run" in told


@pytest.mark.shared
@pytest.mark.parametrize("more", [("tensor_parallel=2",), (), ("zero_stage=3",)])
def test_a_process_that_hangs_is_named_and_all_stop(wrapper, tmp_path, more):
    done = run(launched(2, FAULTY, "hang", 1, 1, "lmms_eval", *evaluation(wrapper, tmp_path, *more)), wait=15)
    assert done.returncode == 1
    assert done.stderr.count("rank 1: nothing done for 15 seconds, so all ranks stop") == 1
    assert not list(tmp_path.rglob("*_results.json"))


@pytest.mark.shared
@pytest.mark.parametrize("processes", [2, 4])
def test_groups_of_two_processes_share_a_model_and_the_questions(wrapper, single, tmp_path, processes):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    done = run([*command, LMMS_EVAL, *map(str, evaluation(wrapper, tmp_path, "tensor_parallel=2"))])
    assert done.returncode == 0, done.stderr[-8000:]  # the launcher's report alone takes 2500
    [samples] = tmp_path.rglob("*_samples_*.jsonl")
    assert by_number(map(json.loads, samples.read_text().splitlines())) == single[0]


def test_the_documented_launches_are_understood(wrapper):
    found = [words for words in launches("lmms_eval") if wrapper.name in words]
    assert found
    for words in found:
        options = launch_command_parser().parse_args(words)
        count = 2 if any("tensor_parallel=2" in word for word in words) else 8
        assert (options.module, options.training_script, options.num_processes) == (True, "lmms_eval", count)
        assert options.training_script_args[:2] == ["--model", wrapper.name]
