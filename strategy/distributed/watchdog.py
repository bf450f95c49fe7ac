"""Stop all processes of a run when one of them fails, hangs or is lost."""

import os
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import NoReturn

from torch import distributed as dist

from strategy.distributed import processes
from strategy.distributed.processes import POLL_SECONDS, rank, rank_timeout, world_size

LAUNCHER_GRACE = 10.0  # seconds that a launcher may take to notice a process that died
GLOO_MARK = "/gloo/transport/"  # in the message of each of gloo's errors, which have no type of their own
ANSWERING = threading.Event()  # set while this process answers lmms-eval's requests


class PassLostError(RuntimeError):
    """A forward pass failed on this rank, and its peers wait in it: whatever else this rank computes, they go apart."""


# Counters of each rank in the store.
def _turns(of: int) -> str:
    return f"turns of {of}"


def _passes(of: int) -> str:
    return f"passes of {of}"


def _heartbeats(of: int) -> str:
    return f"heartbeats of {of}"


def heartbeat() -> None:
    """Count one step of progress; other ranks wait for this one as long as it progresses."""
    if world_size() == 1:
        return
    with launcher_alive():
        processes.store().add(_heartbeats(rank()), 1)


@contextmanager
def launcher_alive() -> Iterator[None]:
    """End this process if the launcher's store is gone, since then nobody stops it if another rank fails."""
    try:
        yield
    except RuntimeError:
        _exit(f"rank {rank()}: what started it is gone, so it stops")


def wait_until_none(missing: Callable[[], list[int]]) -> None:
    """Wait until `missing` returns no rank; stop the run if no missing rank progresses for `rank_timeout()` seconds."""
    store, patience, last, since = processes.store(), rank_timeout(), None, 0.0
    while ranks := missing():
        now = ranks, [store.add(_heartbeats(other), 0) for other in ranks]
        if now != last:
            last, since = now, time.monotonic()
        elif time.monotonic() - since > patience:
            _stop_for(ranks, patience)
        time.sleep(POLL_SECONDS)


def begin_answering() -> None:
    """Mark the begin of a turn in which this rank answers lmms-eval's requests."""
    processes.store().add(_turns(rank()), 1)
    ANSWERING.set()


def finish_answering() -> None:
    """Mark the end of the turn, and wait for the ranks that are still answering.

    lmms-eval itself waits for a day and names nobody. With lmms-eval's cache some ranks may have nothing to answer.
    """
    ANSWERING.clear()
    store = processes.store()
    store.add(_turns(rank()), 1)
    with launcher_alive():
        wait_until_none(lambda: [other for other in range(world_size()) if store.add(_turns(other), 0) % 2])


@contextmanager
def abort_all_on_error() -> Iterator[None]:
    """Turn an error into the end of this process, and so of all that the launcher started."""
    try:
        yield
    except (Exception, SystemExit) as error:
        # lmms-eval would continue without the answers of this rank, and the other ranks would wait for them.
        reason = str(error) or type(error).__name__
        if isinstance(error, dist.DistError) or GLOO_MARK in reason:
            # The launcher knows which rank is lost, and should report it first.
            time.sleep(LAUNCHER_GRACE)
            reason = f"lost another rank ({reason})"
        _stop_all(f"{traceback.format_exc()}rank {rank()}: {reason}, so all ranks stop")


class HangWatchdog(threading.Thread):
    """A thread that stops the run if a rank holds up its peers, all of which wait for each other in each forward pass.

    The run stops if no peer progresses for `rank_timeout()` seconds while all peers answer lmms-eval; the message
    names the peers that are behind.

    Args:
        peers: The ranks that run the same forward passes, this one among them.

    Raises:
        ValueError: As `rank_timeout` raises it.
    """

    passes = 0  # forward passes that this process has begun

    def __init__(self, peers: Sequence[int]) -> None:
        super().__init__(daemon=True)
        self.peers, self.patience = peers, rank_timeout()
        self.start()

    @staticmethod
    def begin(*_: object) -> None:
        """Count a forward pass that begins, or some decode steps; the signature fits a hook."""
        HangWatchdog.passes += 1

    def run(self) -> None:
        last, since, shown = None, 0.0, 0
        while ANSWERING.wait():
            with launcher_alive():
                store, passes = processes.store(), self.passes
                store.add(_passes(rank()), passes - shown)
                shown = passes
                turns, *counts = (
                    [store.add(key(peer), 0) for peer in self.peers] for key in (_turns, _passes, _heartbeats)
                )
                now = turns, counts
                if now != last or not all(turn % 2 for turn in turns):
                    last, since = now, time.monotonic()
                elif time.monotonic() - since > self.patience:
                    _stop_for(self.peers, self.patience)
            time.sleep(10 * POLL_SECONDS)


def _stop_for(ranks: Sequence[int], patience: float) -> NoReturn:
    # Where some ranks wait inside a pass, the rank they wait for has begun fewer passes.
    passes = {other: processes.store().add(_passes(other), 0) for other in ranks}
    names = ", ".join(f"rank {other}" for other in ranks if passes[other] == min(passes.values()))
    _stop_all(
        f"{names}: nothing done for {patience:g} seconds, so all ranks stop; "
        f"{processes.TIMEOUT_ENV} says how many are allowed"
    )


def _stop_all(message: str) -> NoReturn:
    """End this process with a message, or without one if another rank has written the reason already."""
    with launcher_alive():
        if processes.store().add("stopped", 1) > 1:
            time.sleep(10 * POLL_SECONDS)  # the rank that writes the reason must not be stopped before it has
            message = ""
    _exit(message)


def _exit(message: str) -> NoReturn:
    if message:
        processes.log_line(message)
    # Regular shutdown code may wait for the rank that is missing.
    os._exit(1)
