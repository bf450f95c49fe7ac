"""Work that threads do ahead of the thread that needs it, such as decoding the pictures of the next questions."""

import os
from collections import deque
from collections.abc import Callable, Generator, Iterable, Sequence
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from itertools import islice
from threading import Event
from time import monotonic
from typing import TypeVar

T = TypeVar("T")
R = TypeVar("R")
B = TypeVar("B")

DEFAULT_WORKERS = min(4, os.cpu_count() or 1)
THREAD_NAME = "prepare-ahead"  # with which the names of the threads begin
LAUNCHING = 0.1  # of the time that the caller takes for a batch, at its beginning, threads leave the interpreter to it


def prepare_ahead(
    function: Callable[[T], R], items: Iterable[T], workers: int = DEFAULT_WORKERS
) -> Generator[R, None, None]:
    """Yield `function(item)` for each item, in order, while threads work on the items that follow.

    Otherwise as `prepare_batches`, with batches of one item.
    """
    return prepare_batches(function, zip(items), _only, workers)


def _only(results: Sequence[R]) -> R:
    [result] = results
    return result


def prepare_batches(
    function: Callable[[T], R],
    batches: Iterable[Sequence[T]],
    join: Callable[[Sequence[R]], B],
    workers: int = DEFAULT_WORKERS,
) -> Generator[B, None, None]:
    """Yield what `join` makes of `function(item)` for each item of a batch, while threads work on the next batches.

    All threads work on the items of one batch before any begins the next batch, so that nobody waits long for the first
    one. No more than `workers` batches are taken ahead of the one that is yielded, so that memory stays bounded. Close
    the generator when it is left early, as `contextlib.closing` does: items that no thread has begun are dropped, and
    no thread remains.

    Behind a batch for which the caller need not wait, the threads begin nothing for a tenth of the time that the caller
    took for the batch before, or until the caller waits, since they would slow down a caller who launches the work of a
    GPU then.

    Args:
        function: Is called once for each item, by several threads at the same time.
        batches: The batches, which the calling thread iterates over.
        join: Is called once for each batch, in order, by a thread of its own.
        workers: How many threads call `function`; with 0 the calling thread calls both, one batch at a time.

    Raises:
        Exception: What `function` or `join` raises, when the batch's turn has come. The generator ends then.
    """
    if not workers:
        for batch in batches:
            yield join([function(item) for item in batch])
        return

    pool, joiner = ThreadPoolExecutor(workers, THREAD_NAME), ThreadPoolExecutor(1, THREAD_NAME)
    begun: deque[Future[B]] = deque()
    needed, over, quiet_until, taken = Event(), False, 0.0, 0.0
    taking = iter(batches)

    def work(item: T) -> R:
        if (quiet := quiet_until - monotonic()) > 0:
            needed.wait(quiet)
        if over:
            raise CancelledError
        return function(item)

    def joined(parts: Sequence[Future[R]]) -> B:
        return join([part.result() for part in parts])

    def begin(count: int) -> None:
        for batch in islice(taking, count):
            begun.append(joiner.submit(joined, [pool.submit(work, item) for item in batch]))

    try:
        begin(workers)
        while begun:
            if begun[0].done():
                quiet_until = monotonic() + LAUNCHING * taken
                needed.clear()
            else:
                needed.set()
            begin(1)
            ready, since = begun.popleft().result(), monotonic()
            yield ready
            taken = monotonic() - since
    finally:
        over = True
        needed.set()
        # In this order, since `joiner` waits for what `pool` still does, or is told here that it does no more.
        pool.shutdown(cancel_futures=True)
        joiner.shutdown(cancel_futures=True)
