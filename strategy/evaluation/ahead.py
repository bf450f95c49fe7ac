"""Work that threads do ahead of the thread that needs it, such as decoding the pictures of the next questions."""

import os
from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")
R = TypeVar("R")

DEFAULT_WORKERS = min(4, os.cpu_count() or 1)
THREAD_NAME = "prepare-ahead"  # with which the names of the threads begin


def prepare_ahead(
    function: Callable[[T], R], items: Iterable[T], workers: int = DEFAULT_WORKERS
) -> Generator[R, None, None]:
    """Yield `function(item)` for each item, in order, while threads work on the items that follow.

    No more than `workers` items are taken ahead of the one that is yielded, so that memory stays bounded. Close the
    generator when it is left early, as `contextlib.closing` does: items that no thread has begun are dropped, and no
    thread remains.

    Args:
        function: Is called once for each item, by several threads at the same time.
        items: The items, which the calling thread iterates over.
        workers: How many threads work; with 0 the calling thread does, one item at a time.

    Raises:
        Exception: What `function` raises for an item, when that item's turn has come. The generator ends then.
    """
    if not workers:
        yield from map(function, items)
        return
    pool = ThreadPoolExecutor(workers, THREAD_NAME)
    try:
        begun: deque[Future[R]] = deque()
        for item in items:
            begun.append(pool.submit(function, item))
            if len(begun) > workers:
                yield begun.popleft().result()
        while begun:
            yield begun.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)
