"""The processes of one run: what a launcher of torch (accelerate launch, torchrun) started, and how they meet.

They exchange through the launcher's store: collectives would wait for a lost process, and not name it.
"""

import functools
import itertools
import json
import os
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NoReturn

import torch
from torch import distributed as dist
from torch.distributed.rendezvous import rendezvous

WAIT = "VTR_RANK_WAIT"  # the environment variable
SECONDS = 1800.0
PAUSE = 0.1  # seconds between two looks
LOST = 10.0  # seconds that a launcher may take to notice a process that died
GLOO = "/gloo/transport/"  # in the message of each of gloo's errors, which have no type of their own
FILLS = "__padding_only__"  # lmms-eval's mark in the metadata of a request
MEETINGS = itertools.count()
COUNTS = ("turns", "passes", "beats")  # of each rank, in the store
ANSWERING = threading.Event()  # set while this process answers lmms-eval's requests


def rank() -> int:
    """This process's number, from 0."""
    return int(os.environ.get("RANK", "0"))


def count() -> int:
    """How many processes there are."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def take_device() -> str:
    """Where this process computes: the GPU that is its own, made its current one, or the CPU if there is none."""
    if not torch.cuda.is_available():
        return "cpu"
    torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    return f"cuda:{torch.cuda.current_device()}"


def find_device(device: str | torch.device | None) -> torch.device:
    """The device asked for, or the best there is; ValueError if it is not there."""
    try:
        place = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    except RuntimeError as error:
        raise ValueError(f"device={device!r}: allowed are cpu, cuda, cuda:1, ...") from error
    if place.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device={device!r}: there is no CUDA device here")
    return place


def longest_wait() -> float:
    """Seconds that a process may do nothing while others wait for it; ValueError if WAIT is no such number."""
    given = os.environ.get(WAIT, str(SECONDS))
    try:
        seconds = float(given)
    except ValueError:
        seconds = 0.0
    if not 0 < seconds < float("inf"):
        raise ValueError(f"{WAIT}={given!r}: allowed is a number of seconds above 0, as in {WAIT}=600")
    return seconds


@functools.cache
def _store() -> Any:
    store, *_ = next(iter(rendezvous("env://")))
    return store


def beat() -> None:
    """Show the others that this process gets on; they wait for it as long as it does."""
    if count() == 1:
        return
    with _started():
        _store().add(f"beats of {rank()}", 1)


def tell(text: str) -> None:
    """Write a line to stderr in one piece, since others may write to the same terminal.

    torch's launcher starts processes unbuffered, and then `print` writes the end of a line by itself.
    """
    sys.stderr.write(f"{text}\n")
    sys.stderr.flush()


def gather(mine: Any) -> list[Any]:
    """What every process brings to its n-th call of this, in order of rank; several exchange it as JSON.

    If others are missing and none of them gets on for `longest_wait`, this process ends, and one says who is missing.
    """
    if count() == 1:
        return [mine]
    store, meeting = _store(), next(MEETINGS)
    store.set(f"meeting {meeting} of {rank()}", json.dumps(mine))
    with _started():
        _wait(lambda: [other for other in range(count()) if not store.check([f"meeting {meeting} of {other}"])])
    return [json.loads(store.get(f"meeting {meeting} of {other}")) for other in range(count())]


def fills(request: Any) -> bool:
    """Whether a request of lmms-eval's only evens out the ranks: it throws the answer away."""
    return bool((request.metadata or {}).get(FILLS))


def answer_own(requests: Sequence[Any], answer: Callable[[list[Any]], list[Any]], nothing: Any) -> list[Any]:
    """Answer lmms-eval's requests, and then wait for the other processes as `gather` does, if they are at it too.

    Those by which lmms-eval evens out the ranks get `nothing`, since they would count twice in the run record. Among
    several processes an error is the end of this one, and so of all.
    """
    if count() == 1:
        return answer(list(requests))
    filling = [fills(request) for request in requests]
    own = [request for request, fill in zip(requests, filling, strict=True) if not fill]
    store = _store()
    store.add(f"turns of {rank()}", 1)
    ANSWERING.set()
    with ending_all():
        answers = iter(answer(own))
    ANSWERING.clear()
    store.add(f"turns of {rank()}", 1)
    # lmms-eval itself waits for a day, and names nobody. With its cache some may have nothing to answer.
    with _started():
        _wait(lambda: [other for other in range(count()) if store.add(f"turns of {other}", 0) % 2])
    return [nothing if fill else next(answers) for fill in filling]


@contextmanager
def ending_all() -> Iterator[None]:
    """Make an error the end of this process, and so of all that were started with it."""
    try:
        yield
    except (Exception, SystemExit) as error:
        # lmms-eval would go on without this one's answers, and the others would wait for them.
        reason = str(error) or type(error).__name__
        if isinstance(error, dist.DistError) or GLOO in reason:
            # The launcher knows which one is lost, and should be first to tell.
            time.sleep(LOST)
            reason = f"lost another rank ({reason})"
        _stop_all(f"{traceback.format_exc()}rank {rank()}: {reason}, so all ranks stop")


class Watch(threading.Thread):
    """Looks for a rank that holds up its peers, all of which wait for each other in each forward pass.

    peers: the ranks that do, this one among them. If none of them gets on for `longest_wait` while all of them answer
    lmms-eval, see `answer_own`, all stop, and those that are behind are named. Raises ValueError as that does.
    """

    passes = 0  # that this process has begun

    def __init__(self, peers: Sequence[int]) -> None:
        super().__init__(daemon=True)
        self.peers, self.patience = peers, longest_wait()
        self.start()

    @staticmethod
    def begin(*_: Any) -> None:
        """Count a forward pass that begins, or some tokens of an answer; fit to be a hook."""
        Watch.passes += 1

    def run(self) -> None:
        last, since, shown = None, 0.0, 0
        while ANSWERING.wait():
            with _started():
                store, passes = _store(), self.passes
                store.add(f"passes of {rank()}", passes - shown)
                shown = passes
                now = [[store.add(f"{what} of {peer}", 0) for peer in self.peers] for what in COUNTS]
                if now != last or not all(turn % 2 for turn in now[0]):
                    last, since = now, time.monotonic()
                elif time.monotonic() - since > self.patience:
                    _stop_for(self.peers, self.patience)
            time.sleep(10 * PAUSE)


@contextmanager
def _started() -> Iterator[None]:
    """End this process if what started it is gone: nobody would stop it if another one failed."""
    try:
        yield
    except RuntimeError:
        _end(f"rank {rank()}: what started it is gone, so it stops")


def _wait(missing: Callable[[], list[int]]) -> None:
    store, patience, last, since = _store(), longest_wait(), None, 0.0
    while ranks := missing():
        now = ranks, [store.add(f"beats of {other}", 0) for other in ranks]
        if now != last:
            last, since = now, time.monotonic()
        elif time.monotonic() - since > patience:
            _stop_for(ranks, patience)
        time.sleep(PAUSE)


def _stop_for(ranks: Sequence[int], patience: float) -> NoReturn:
    # Where some wait within a pass, the one they wait for has begun fewer.
    passes = {other: _store().add(f"passes of {other}", 0) for other in ranks}
    names = ", ".join(f"rank {other}" for other in ranks if passes[other] == min(passes.values()))
    _stop_all(f"{names}: nothing done for {patience:g} seconds, so all ranks stop; {WAIT} says how many are allowed")


def _stop_all(told: str) -> NoReturn:
    """End this process, and tell why, unless it is the end of another one that ends it."""
    with _started():
        if _store().add("told", 1) > 1:
            time.sleep(10 * PAUSE)  # the one that tells should not be stopped before it has
            told = ""
    _end(told)


def _end(told: str) -> NoReturn:
    if told:
        tell(told)
    # Whatever a process does on its way out may wait for the one that is missing.
    os._exit(1)
