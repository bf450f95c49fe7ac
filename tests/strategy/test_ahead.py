"""Threads that work ahead: in order, no further than allowed, and gone whenever the work ends."""

import threading
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from functools import partial
from itertools import count

import pytest

from strategy.evaluation import ahead
from strategy.evaluation.ahead import THREAD_NAME, prepare_ahead, prepare_batches

WORKERS = pytest.mark.parametrize("workers", [0, 1, 4])
THREADED = pytest.mark.parametrize("workers", [1, 4])
WAIT = 60  # seconds after which a thread that should have come is taken for lost


def threads():
    return [thread for thread in threading.enumerate() if thread.name.startswith(THREAD_NAME)]


@WORKERS
@pytest.mark.parametrize("length", [0, 1, 3, 20])
def test_each_item_is_worked_on_once_and_comes_in_order(workers, length):
    worked = []

    def square(number):
        worked.append(number)
        return number**2

    assert list(prepare_ahead(square, range(length), workers)) == [number**2 for number in range(length)]
    assert sorted(worked) == list(range(length))
    assert not threads()


def test_a_later_item_that_is_ready_first_waits_for_its_turn():
    second_is_ready = threading.Event()

    def work(number):
        if number == 0:
            assert second_is_ready.wait(WAIT)
        elif number == 1:
            second_is_ready.set()
        return number

    assert list(prepare_ahead(work, range(4), 2)) == [0, 1, 2, 3]


@THREADED
def test_threads_work_while_the_caller_holds_a_result(workers):
    begun = [threading.Event() for _ in range(5)]

    def work(number):
        begun[number].set()
        return threading.get_ident()

    with closing(prepare_ahead(work, range(5), workers)) as results:
        assert next(results) != threading.get_ident()
        assert begun[1].wait(WAIT)


def test_without_workers_the_calling_thread_works_when_asked():
    worked = []

    def work(number):
        worked.append(number)
        return threading.get_ident()

    results = prepare_ahead(work, range(3), 0)
    assert next(results) == threading.get_ident()
    assert worked == [0]


@WORKERS
def test_no_more_items_are_taken_ahead_than_there_are_workers(workers):
    taken = []
    with closing(prepare_ahead(str, (taken.append(number) or number for number in count()), workers)) as results:
        for number in range(10):
            assert next(results) == str(number)
            assert len(taken) == number + 1 + workers


@WORKERS
def test_an_error_comes_when_its_turn_has_come_and_ends_the_work(workers):
    worked, items = [], []

    def work(number):
        worked.append(number)
        if number in (2, 3):
            raise LookupError(f"item {number}")
        return number

    results = prepare_ahead(work, (items.append(number) or number for number in count()), workers)
    assert [next(results), next(results)] == [0, 1]
    with pytest.raises(LookupError, match="item 2"):
        next(results)
    assert not threads()
    assert len(items) == 3 + workers
    assert set(worked) <= set(items)
    assert list(results) == []


@THREADED
@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError])
def test_an_error_of_the_caller_drops_what_has_not_begun_and_leaves_no_thread(workers, error):
    worked, busy, finish = [], threading.Semaphore(0), threading.Event()

    def work(number):
        worked.append(number)
        if number:
            busy.release()
            assert finish.wait(WAIT)
        return number

    def leave():
        with closing(prepare_ahead(work, range(100), workers)) as results:
            next(results)
            for _ in range(workers):
                assert busy.acquire(timeout=WAIT)
            finish.set()
            raise error

    with pytest.raises(error):
        leave()
    assert not threads()
    assert sorted(worked) == list(range(1 + workers))


def test_an_error_of_the_items_comes_through_and_leaves_no_thread():
    def items():
        yield 1
        raise LookupError("no second item")

    with pytest.raises(LookupError, match="no second item"):
        list(prepare_ahead(str, items(), 3))
    assert not threads()


@WORKERS
@pytest.mark.parametrize("sizes", [[], [1], [3, 1, 2], [2] * 9])
def test_batches_are_joined_in_order(workers, sizes):
    batches = [[(number, item) for item in range(size)] for number, size in enumerate(sizes)]
    assert list(prepare_batches(str, batches, list, workers)) == [[str(item) for item in batch] for batch in batches]
    assert not threads()


def test_all_threads_work_on_the_first_batch_first():
    together = threading.Barrier(3)

    def work(item):
        if item < 3:
            together.wait(WAIT)  # raises where fewer than three threads come
        return item

    with closing(prepare_batches(work, [[0, 1, 2], [3], [4]], sum, 3)) as sums:
        assert next(sums) == 3


class AtOnce(Future):
    """Stands for work that a thread has done before anybody asks for the result."""

    def __init__(self, function, *args):
        super().__init__()
        self.set_result(function(*args))


class WhenAsked(Future):
    """Stands for work that is done while somebody waits for the result."""

    def __init__(self, function, *args):
        super().__init__()
        self.function = partial(function, *args)

    def result(self, timeout=None):
        self.set_result(self.function())
        return super().result()


@pytest.mark.parametrize("workers", [1, 3])
@pytest.mark.parametrize(("kind", "expected"), [(AtOnce, [0.8, 0.5]), (WhenAsked, [])])
def test_threads_are_quiet_while_a_caller_who_need_not_wait_launches(monkeypatch, kind, expected, workers):
    now, quiet = [100.0], []

    class Executor:
        def __init__(self, *_):
            self.submit = kind

        def shutdown(self, cancel_futures):
            assert cancel_futures

    class Recorder(threading.Event):
        def wait(self, timeout=None):
            quiet.append(pytest.approx(timeout))

    for name, fake in {"monotonic": lambda: now[0], "Event": Recorder, "ThreadPoolExecutor": Executor}.items():
        monkeypatch.setattr(ahead, name, fake)
    with closing(prepare_ahead(str, count(), workers)) as results:
        for took in (8, 5, 3):
            next(results)
            now[0] += took
    assert quiet == expected


@pytest.mark.parametrize("waits", [True, False])
def test_a_quiet_thread_goes_on_when_the_caller_waits_and_begins_nothing_when_he_leaves(monkeypatch, waits):
    now, worked = [0.0], []

    def work(number):
        worked.append(number)
        return number

    class Noted(threading.Event):
        def wait(self, timeout=None):
            quiet.set()
            return super().wait(timeout)

    quiet = threading.Event()
    monkeypatch.setattr(ahead, "Event", Noted)
    monkeypatch.setattr(ahead, "monotonic", lambda: now[0])
    with closing(prepare_ahead(work, count(), 1)) as results, ThreadPoolExecutor(1) as caller:
        assert next(results) == 0
        now[0] += 5 * WAIT / ahead.LAUNCHING
        results.gi_frame.f_locals["begun"][0].result(WAIT)
        assert next(results) == 1
        assert quiet.wait(WAIT)
        if waits:
            assert caller.submit(next, results).result(WAIT) == 2
    assert worked[:3] == [0, 1, 2][: 2 + waits]
    assert not threads()


@WORKERS
@pytest.mark.parametrize("where", ["item", "join"])
def test_an_error_in_a_batch_comes_when_its_turn_has_come(workers, where):
    def work(item):
        if where == "item" and item == 3:
            raise LookupError("item 3")
        return item

    def join(items):
        if where == "join" and 3 in items:
            raise LookupError("item 3")
        return sum(items)

    sums = prepare_batches(work, [[0, 1], [2, 3], [4, 5], [6, 7]], join, workers)
    assert next(sums) == 1
    with pytest.raises(LookupError, match="item 3"):
        next(sums)
    assert not threads()
    assert list(sums) == []
