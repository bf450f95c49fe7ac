"""Calls that begin ahead: what needs a turn waits for it, and every thread is released whenever the work ends."""

import threading
from contextlib import closing
from itertools import count

import pytest

from strategy.evaluation.ahead import THREAD_NAME
from strategy.evaluation.turns import EndOfTurnsError, Turn, take_turns

WORKERS = pytest.mark.parametrize("workers", [1, 4])
WAIT = 60  # seconds after which a thread that should have come is taken for lost


def threads():
    return [thread for thread in threading.enumerate() if thread.name.startswith(THREAD_NAME)]


@WORKERS
def test_what_is_asked_is_done_by_the_calling_thread_in_order(workers):
    done = []

    def answer(number):
        done.append((number, threading.get_ident()))
        return number**2

    def work(number, turn):
        if number % 3 == 0:
            return number**2  # asks for nothing
        turn.wait()
        return turn.call(answer, number)

    assert list(take_turns(work, range(20), workers)) == [number**2 for number in range(20)]
    assert done == [(number, threading.get_ident()) for number in range(20) if number % 3]
    assert not threads()


@WORKERS
def test_later_calls_begin_while_one_has_its_turn_and_wait_for_their_own(workers):
    begun, having = [threading.Event() for _ in range(6)], []

    def answer(number):
        having.append(number)
        assert begun[min(number + 1, 5)].wait(WAIT)
        assert having == list(range(number + 1))

    def work(number, turn):
        begun[number].set()
        turn.call(answer, number)

    assert list(take_turns(work, range(6), workers)) == [None] * 6
    assert having == list(range(6))


@WORKERS
def test_from_its_wait_to_its_end_a_call_is_alone(workers):
    inside = []

    def work(number, turn):
        turn.wait()
        inside.append(number)
        turn.wait()
        assert inside == [number]
        inside.remove(number)
        return number

    assert list(take_turns(work, range(20), workers)) == list(range(20))


@WORKERS
def test_no_more_items_are_taken_ahead_than_there_are_workers(workers):
    taken = []
    items = (taken.append(number) or number for number in count())
    with closing(take_turns(lambda number, turn: turn.call(str, number), items, workers)) as results:
        for number in range(10):
            assert next(results) == str(number)
            assert len(taken) == number + 1 + workers


@WORKERS
@pytest.mark.parametrize("caught", [True, False])
def test_an_error_of_what_was_asked_is_first_that_of_the_call(workers, caught):
    def fail(number):
        if number == 2:
            raise LookupError(f"item {number}")
        return number

    def work(number, turn):
        try:
            return turn.call(fail, number)
        except LookupError:
            if caught:
                return "caught"
            raise

    results = take_turns(work, range(6), workers)
    if caught:
        assert list(results) == [0, 1, "caught", 3, 4, 5]
        return
    assert [next(results), next(results)] == [0, 1]
    with pytest.raises(LookupError, match="item 2"):
        next(results)
    assert not threads()


@WORKERS
def test_an_error_before_anything_is_asked_comes_in_its_turn(workers):
    asked = []

    def work(number, turn):
        if number == 2:
            raise LookupError("item 2")
        turn.call(asked.append, number)
        return number

    results = take_turns(work, count(), workers)
    assert [next(results), next(results)] == [0, 1]
    with pytest.raises(LookupError, match="item 2"):
        next(results)
    assert asked == [0, 1]
    assert not threads()


@WORKERS
@pytest.mark.parametrize("place", ["asked", "between"])
def test_an_interrupt_releases_every_call_and_no_handler_stops_it(workers, place):
    waiting, ended = threading.Semaphore(0), []

    def answer(number):
        if number == 2 and place == "asked":
            for _ in range(1 + workers):
                assert waiting.acquire(timeout=WAIT)
            raise KeyboardInterrupt
        return number

    def work(number, turn):
        if number >= 2:
            waiting.release()
        try:
            return turn.call(answer, number)
        except Exception:  # as some of lmms-eval's loops do
            return "lost"
        except EndOfTurnsError:
            ended.append(number)
            raise

    def interrupted():
        with closing(take_turns(work, count(), workers)) as results:
            for number, result in enumerate(results):
                assert result == number
                if place == "between" and number == 1:
                    for _ in range(workers):
                        assert waiting.acquire(timeout=WAIT)
                    raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert not threads()
    assert sorted(ended) == list(range(2, 2 + workers + (place == "asked")))


def test_a_call_that_asks_once_all_has_ended_is_released_too():
    turn, asked = Turn(), []
    turn.end()
    with pytest.raises(EndOfTurnsError):
        turn.call(asked.append, 1)
    assert asked == []
