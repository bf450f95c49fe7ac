"""The processes of one run, as a launcher of torch (accelerate launch, torchrun) started them."""

import functools
import os
import sys
from typing import Any

import torch
from torch.distributed.rendezvous import rendezvous

TIMEOUT_ENV = "VTR_RANK_WAIT"
DEFAULT_TIMEOUT = 1800.0  # seconds
# Placements of a model's parts over several devices, which accelerate chooses.
PLACEMENTS = ("auto", "balanced", "balanced_low_0", "sequential")
POLL_SECONDS = 0.1  # between two looks at what the other ranks have written


def rank() -> int:
    """Return this process's number, from 0."""
    return int(os.environ.get("RANK", "0"))


def world_size() -> int:
    """Return how many processes there are."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def take_device() -> str:
    """Make this process's own GPU the current one and return its name; without a GPU, return "cpu"."""
    if not torch.cuda.is_available():
        return "cpu"
    torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    return f"cuda:{torch.cuda.current_device()}"


def find_device(device: str | torch.device | None) -> torch.device:
    """Return the device with that name, or the best one if the name is None.

    Raises:
        ValueError: The device does not exist on this machine.
    """
    try:
        place = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if device in (None, "") else device)
    except (RuntimeError, TypeError) as error:
        raise ValueError(f"device={device!r}: allowed are cpu, cuda, cuda:1, ...") from error
    if place.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device={device!r}: there is no CUDA device here")
    if place.type == "cuda" and (place.index or 0) >= torch.cuda.device_count():
        raise ValueError(
            f"device={device!r}: CUDA devices are numbered from 0, and there are {torch.cuda.device_count()}"
        )
    accelerator = torch.accelerator.current_accelerator()
    if place.type not in ("cpu", "cuda", accelerator and accelerator.type):
        raise ValueError(f"device={device!r}: allowed are cpu, cuda, cuda:1, ...")
    return place


def rank_timeout() -> float:
    """Return for how many seconds a rank may do nothing while others wait for it.

    Raises:
        ValueError: The environment variable `TIMEOUT_ENV` is not such a number.
    """
    given = os.environ.get(TIMEOUT_ENV, str(DEFAULT_TIMEOUT))
    try:
        seconds = float(given)
    except ValueError:
        seconds = 0.0
    if not 0 < seconds < float("inf"):
        raise ValueError(f"{TIMEOUT_ENV}={given!r}: allowed is a number of seconds above 0, as in {TIMEOUT_ENV}=600")
    return seconds


@functools.cache
def store() -> Any:
    """Return the launcher's key-value store.

    Ranks wait for each other through this store, since a collective neither ends nor names the rank that is lost.
    """
    found, *_ = next(iter(rendezvous("env://")))
    return found


def log_line(text: str) -> None:
    """Write a line to stderr in one piece, since other ranks may write to the same terminal.

    torch's launcher starts processes unbuffered, and then `print` writes the end of a line by itself.
    """
    sys.stderr.write(f"{text}\n")
    sys.stderr.flush()
