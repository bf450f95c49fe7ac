"""Processes that meet, that wait for one that is slow, and that stop for one that hangs or has an error."""

import json
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st
from launching import scripted, told

from strategy.distributed.collectives import gather
from strategy.distributed.processes import TIMEOUT_ENV, rank_timeout
from strategy.metrics import record as records
from strategy.metrics.record import RunRecord, Stage

pytestmark = pytest.mark.processes
DEPTH = 4


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
    assert told(scripted(tmp_path, 3, body)) == (0, ["said True"] * 9)


def test_a_slow_process_is_waited_for_as_long_as_it_gets_on(tmp_path):
    body = """
    collectives.gather(None)
    os.environ[processes.TIMEOUT_ENV] = "3"
    for _ in range(20 * me):
        time.sleep(0.25)
        watchdog.heartbeat()
    say(f"said {collectives.gather(me)}")
    """
    assert told(scripted(tmp_path, 2, body)) == (0, ["said [0, 1]"] * 2)


@pytest.mark.parametrize("lost", [0, 1])
def test_one_message_names_the_process_that_hangs(tmp_path, lost):
    body = f"""
    collectives.gather(None)
    os.environ[processes.TIMEOUT_ENV] = "4"
    time.sleep(3600 * (me == {lost}))
    collectives.gather(me)
    """
    start = time.monotonic()
    status, lines = told(scripted(tmp_path, 3, body))
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
    status, lines = told(scripted(tmp_path, 2, body))
    assert (status, lines) == (1, ["rank 1: no room for 7 tokens, so all ranks stop"])


def test_an_error_where_processes_keep_in_step_stops_all_and_is_told(tmp_path):
    body = """
    from strategy.distributed import zero
    if me == 0:
        time.sleep(3600)
    with zero.lockstep(object()):
        raise MemoryError("no room for 7 tokens")
    """
    status, lines = told(scripted(tmp_path, 2, body))
    assert (status, lines) == (1, ["rank 1: no room for 7 tokens, so all ranks stop"])


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
