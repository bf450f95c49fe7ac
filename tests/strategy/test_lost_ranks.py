"""Processes that stop for one that is lost in the middle of a pass, or with what started them."""

import signal

import pytest
from launching import scripted, told

from strategy.distributed.processes import TIMEOUT_ENV

pytestmark = pytest.mark.processes


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
    assert told(scripted(tmp_path, 2, body)) == (1, [f"said {seen}"])


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
    status, lines = told(scripted(tmp_path, 2, body))
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
    process = scripted(tmp_path, 2, body)
    for _ in range(2):
        assert process.stdout.readline() == "at work\n"
    process.send_signal(signal.SIGKILL)
    _, lines = told(process)  # which ends when the last of them has let go of the pipe
    assert sorted(lines) == [f"rank {number}: what started it is gone, so it stops" for number in range(2)]
