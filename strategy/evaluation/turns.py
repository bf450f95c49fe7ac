"""Calls that begin ahead in threads, and that the calling thread helps to the end one after the other."""

from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from queue import Empty, SimpleQueue
from typing import Any, TypeVar

import torch

from strategy.evaluation.ahead import THREAD_NAME

T = TypeVar("T")
R = TypeVar("R")


class EndOfTurnsError(BaseException):
    """Ends a thread whose turn will not come; no `except Exception` of the code that it runs stops it."""


class Turn:
    """What a thread has the calling thread do once the turn of the thread's item has come."""

    def __init__(self) -> None:
        self._asked: SimpleQueue[tuple[Future[Any], Callable[[], Any]] | None] = SimpleQueue()
        self._ended = False

    def call(self, function: Callable[..., R], *args: Any, **kwargs: Any) -> R:
        """Have the calling thread call a function in this item's turn, and return what it returns.

        Raises:
            Exception: What the function raises.
            EndOfTurnsError: The turn will not come, or was interrupted.
        """
        result: Future[R] = Future()
        self._asked.put((result, partial(function, *args, **kwargs)))
        if self._ended:  # nobody looks at what is asked any more
            raise EndOfTurnsError
        return result.result()

    def wait(self) -> None:
        """Wait until this item's turn has come; until its call ends, no other one's turn comes."""
        self.call(lambda: None)

    def finish(self) -> None:
        """Tell the calling thread that nothing more will be asked."""
        self._asked.put(None)

    def serve(self) -> None:
        """Do what the thread asks for until it has finished; the calling thread calls it in the item's turn."""
        while (asked := self._asked.get()) is not None:
            result, function = asked
            try:
                result.set_result(function())
            except Exception as error:
                result.set_exception(error)  # the thread may know what to do about it
            except BaseException:
                result.set_exception(EndOfTurnsError())
                raise

    def end(self) -> None:
        """Release the thread if it waits for this turn."""
        self._ended = True
        try:
            while True:
                if (asked := self._asked.get_nowait()) is not None:
                    asked[0].set_exception(EndOfTurnsError())
        except Empty:
            pass


def take_turns(function: Callable[[T, Turn], R], items: Iterable[T], workers: int) -> Generator[R, None, None]:
    """Yield `function(item, turn)` for each item, in order, while threads run the calls for the items that follow.

    A call may need what only one thread may use at a time, and only in the order of the items, such as a model. It
    uses that between `turn.wait()` and its end, or has the calling thread use it by `turn.call`; before, it runs at the
    same time as the others. Otherwise as `prepare_ahead`; close the generator likewise.

    Args:
        function: Is called once for each item, in a thread.
        items: The items, which the calling thread iterates over.
        workers: How many calls run ahead of the one whose turn it is, from 1 up.

    Raises:
        Exception: What `function` raises for an item, when that item's turn has come. The generator ends then.
    """

    def run(item: T, turn: Turn) -> R:
        try:
            return function(item, turn)
        finally:
            turn.finish()

    def oldest() -> R:
        turn, result = begun[0]
        turn.serve()
        begun.popleft()
        return result.result()

    begun: deque[tuple[Turn, Future[R]]] = deque()
    # Each thread has a current device of its own.
    enter = partial(torch.cuda.set_device, torch.cuda.current_device()) if torch.cuda.is_initialized() else None
    pool = ThreadPoolExecutor(workers + 1, THREAD_NAME, enter)  # one more, for the call whose turn it is
    try:
        for item in items:
            turn = Turn()
            begun.append((turn, pool.submit(run, item, turn)))
            if len(begun) > workers:
                yield oldest()
        while begun:
            yield oldest()
    finally:
        for turn, _ in begun:
            turn.end()
        pool.shutdown(cancel_futures=True)
