"""Processes that meet, that wait for one that is slow, and that stop for one that is lost."""

import json
import os
import signal
import subprocess
import sys
import textwrap
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from strategy.distributed.collectives import gather
from strategy.distributed.processes import TIMEOUT_ENV, rank_timeout
from strategy.metrics import record as records
from strategy.metrics.record import RunRecord, Stage

DEPTH = 4


def launch(tmp_path, count, body):
    """Start so many processes of a script with its own number `me`, and `say`, which writes a line in one piece."""
    script = tmp_path / "script.py"
    script.write_text(
        "import os, signal, sys, time\nfrom strategy.distributed import collectives, processes, watchdog\n"
        "from strategy.evaluation.requests import answer_own\nme = processes.rank()\n"
        "say = lambda text: os.write(1, f'{text}\\n'.encode())\n" + textwrap.dedent(body)
    )
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node",
        str(count),
        str(script),
    ]
    given = {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.Popen(command, env=os.environ | given, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def told(process):
    """The exit status, and the lines of the script's own."""
    out, errors = process.communicate(timeout=120)
    return process.returncode, [line for line in (out + errors).splitlines() if line.startswith(("said", "rank "))]


def test_alone_nothing_is_exchanged():
    marker = object()
    assert gather(marker)[0] is marker


def test_what_processes_bring_comes_in_their_order(tmp_path):
    body = """
    for turn in range(3):
        time.sleep(0.3 * (me == turn))
        brought = collectives.gather(dict(rank=me, turn=turn))
        say(f"said {brought == [dict(rank=each, turn=turn) for each in range(3)]}")
    """
    assert told(launch(tmp_path, 3, body)) == (0, ["said True"] * 9)


def test_a_slow_process_is_waited_for_as_long_as_it_gets_on(tmp_path):
    body = """
    collectives.gather(None)
    os.environ[processes.TIMEOUT_ENV] = "3"
    for _ in range(20 * me):
        time.sleep(0.25)
        watchdog.heartbeat()
    say(f"said {collectives.gather(me)}")
    """
    assert told(launch(tmp_path, 2, body)) == (0, ["said [0, 1]"] * 2)


@pytest.mark.parametrize("lost", [0, 1])
def test_one_message_names_the_process_that_hangs(tmp_path, lost):
    body = f"""
    collectives.gather(None)
    os.environ[processes.TIMEOUT_ENV] = "4"
    time.sleep(3600 * (me == {lost}))
    collectives.gather(me)
    """
    start = time.monotonic()
    status, lines = told(launch(tmp_path, 3, body))
    assert (status, lines) == (
        1,
        [f"rank {lost}: nothing done for 4 seconds, so all ranks stop; {TIMEOUT_ENV} says how many are allowed"],
    )
    assert time.monotonic() - start < 60


def test_an_error_among_lmms_evals_requests_stops_all_and_is_told(tmp_path):
    body = """
    def answer(requests):
        if me == 1:
            raise MemoryError("no room for 7 tokens")
        return requests
    class Request: metadata = {}
    answer_own([Request()], answer, "")
    time.sleep(3600)
    """
    status, lines = told(launch(tmp_path, 2, body))
    assert (status, lines) == (1, ["rank 1: no room for 7 tokens, so all ranks stop"])


def test_an_error_where_processes_keep_in_step_stops_all_and_is_told(tmp_path):
    body = """
    from strategy.distributed import zero
    if me == 0:
        time.sleep(3600)
    with zero.lockstep(object()):
        raise MemoryError("no room for 7 tokens")
    """
    status, lines = told(launch(tmp_path, 2, body))
    assert (status, lines) == (1, ["rank 1: no room for 7 tokens, so all ranks stop"])


@pytest.mark.parametrize("seen", ["closed", "reset"])
def test_a_process_that_loses_another_does_not_tell_of_itself(tmp_path, seen):
    body = f"""
    from socket import SO_LINGER, SOL_SOCKET, socket
    from threading import Timer
    from torch import distributed as dist
    dist.init_process_group("gloo")
    # The launcher may terminate this process before it has said what it has seen.
    signal.signal(signal.SIGTERM, lambda *_: Timer(3, os._exit, (1,)).start())
    def sockets():
        for number in map(int, os.listdir("/proc/self/fd")):
            try:
                yield socket(fileno=os.dup(number))
            except OSError:
                pass
    def answer(requests):
        dist.all_reduce(dist.torch.ones(1))
        if me == 1:
            for each in sockets() if {seen == "reset"} else ():
                each.setsockopt(SOL_SOCKET, SO_LINGER, bytes([1, 0, 0, 0, 0, 0, 0, 0]))  # on, for no time
                each.detach()
            Timer(1, os.kill, (os.getpid(), signal.SIGKILL)).start()
            time.sleep(3600)
        try:
            dist.all_reduce(dist.torch.ones(1))
        except RuntimeError as error:
            say("said reset" if "reset" in str(error) else "said closed")
            raise
    class Request: metadata = {{}}
    answer_own([Request()], answer, "")
    """
    assert told(launch(tmp_path, 2, body)) == (1, [f"said {seen}"])


@pytest.mark.parametrize(("lost", "named"), [([1], "rank 1"), ([0, 1], "rank 0, rank 1")])
def test_a_process_that_others_wait_for_within_a_pass_is_named(tmp_path, lost, named):
    body = f"""
    from torch import distributed as dist
    dist.init_process_group("gloo")
    os.environ[processes.TIMEOUT_ENV] = "3"
    watch = watchdog.HangWatchdog(range(2))
    def answer(requests):
        for number in range(3):
            watch.begin()
            dist.all_reduce(dist.torch.ones(1))
        if me in {lost}:
            time.sleep(3600)
        watch.begin()
        dist.all_reduce(dist.torch.ones(1))
    class Request: metadata = {{}}
    time.sleep(5 * me)  # longer than allowed, but not all of them answer yet
    answer_own([Request()], answer, "")
    """
    status, lines = told(launch(tmp_path, 2, body))
    assert (status, lines) == (
        1,
        [f"{named}: nothing done for 3 seconds, so all ranks stop; {TIMEOUT_ENV} says how many are allowed"],
    )


def test_processes_stop_when_what_started_them_is_gone(tmp_path):
    body = """
    watchdog.heartbeat()
    say("at work")
    while True:
        time.sleep(0.2)
        watchdog.heartbeat()
    """
    process = launch(tmp_path, 2, body)
    for _ in range(2):
        assert process.stdout.readline() == "at work\n"
    process.send_signal(signal.SIGKILL)
    _, lines = told(process)  # which ends when the last of them has let go of the pipe
    assert sorted(lines) == [f"rank {number}: what started it is gone, so it stops" for number in range(2)]


@given(
    text=st.text(st.characters(codec="utf-8", exclude_characters="\0")) | st.floats().map(str) | st.integers().map(str)
)
def test_the_wait_is_a_number_of_seconds_or_an_error_that_says_so(text):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(TIMEOUT_ENV, text)
        try:
            seconds = rank_timeout()
        except ValueError as error:
            said = str(error)
        else:
            assert 0 < seconds < float("inf")
            return
    assert said.startswith(f"{TIMEOUT_ENV}={text!r}: allowed is a number of seconds above 0")


prompts = st.lists(
    st.tuples(st.lists(st.integers(1, 600), max_size=3), st.integers(0, 9), st.floats(0, 9, allow_subnormal=False)),
    max_size=9,
)


def counted(calls):
    """A record of calls: visual tokens of each sample, tokens decoded, seconds."""
    record = RunRecord("clse", DEPTH, None)
    for visual, decoded, seconds in calls:
        if visual:
            stages = [Stage(layer, sum(visual), sum(visual) // (2 * layer), ()) for layer in (1, 3)]
            record.add_stages(len(visual), visual, stages)
        record.add_cache(len(visual), 7, 1024)
        record.decoded += decoded
        record.multiply_adds["decode" if decoded else "vision"] += 10**15 + decoded
        record.clock.sums["vision"] += seconds
    return record


@given(calls=prompts, data=st.data())
def test_the_records_of_all_processes_add_up_to_that_of_one(calls, data):
    count = data.draw(st.integers(1, 4))
    parts = [counted(calls[number::count]) for number in range(count)]
    brought = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(records, "gather", lambda mine: brought.append(json.dumps(mine)) or [json.loads(brought[0])])
        for part in parts:
            part.reduce_over_ranks()
            counted([([500], 5, 5.0)]).reduce_over_ranks(counts=False)
        patch.setattr(records, "gather", lambda mine: [json.loads(each) for each in brought])
        merged = parts[0].reduce_over_ranks().means()
    alone = counted(calls).means()
    assert merged.pop("seconds") == pytest.approx(alone.pop("seconds"))
    assert merged == alone
