"""Work that threads do ahead of the thread that needs it, such as decoding the pictures of the next questions."""

import os
from collections import deque
from collections.abc import Callable, Generator, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")
R = TypeVar("R")
B = TypeVar("B")

DEFAULT_WORKERS = min(4, os.cpu_count() or 1)
THREAD_NAME = "prepare-ahead"  # with which the names of the threads begin


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

    def joined(parts: Sequence[Future[R]]) -> B:
        return join([part.result() for part in parts])

    pool, joiner = ThreadPoolExecutor(workers, THREAD_NAME), ThreadPoolExecutor(1, THREAD_NAME)
    try:
        begun: deque[Future[B]] = deque()
        for batch in batches:
            begun.append(joiner.submit(joined, [pool.submit(function, item) for item in batch]))
            if len(begun) > workers:
                yield begun.popleft().result()
        while begun:
            yield begun.popleft().result()
    finally:
        # In this order, since `joiner` waits for what `pool` still does, or is told here that it does no more.
        pool.shutdown(cancel_futures=True)
        joiner.shutdown(cancel_futures=True)
