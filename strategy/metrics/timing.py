"""Seconds by phase, measured without waiting for the device."""

import time
from collections import defaultdict
from typing import Any, NamedTuple

import torch

# Pairs of events that may wait to be read before the finished ones are read.
MAX_PENDING = 1000


class Timestamp(NamedTuple):
    """When something began: seconds, or on a GPU an event; None during the capture of a CUDA graph."""

    at: Any
    device: torch.device


class Clock:
    """Seconds by phase; on a GPU the time between events, which are read when somebody asks."""

    def __init__(self) -> None:
        self.sums: dict[str, float] = defaultdict(float)
        self.pending: list[tuple[str, torch.cuda.Event, torch.cuda.Event]] = []

    def start(self, device: torch.device) -> Timestamp:
        """Return the present time on a device."""
        if device.type != "cuda":
            return Timestamp(time.perf_counter(), device)
        if torch.cuda.is_current_stream_capturing():
            # A graph runs later, and as often as it is replayed.
            return Timestamp(None, device)
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(device))
        return Timestamp(event, device)

    def stop(self, phase: str, since: Timestamp) -> None:
        """Add the time since a timestamp, on its device, to a phase."""
        until = self.start(since.device)
        if until.at is None:
            return
        if since.device.type != "cuda":
            self.sums[phase] += until.at - since.at
            return
        self.pending.append((phase, since.at, until.at))
        if len(self.pending) > MAX_PENDING:
            self._read(wait=False)

    def _read(self, wait: bool) -> None:
        waiting, self.pending = self.pending, []
        for phase, since, until in waiting:
            if wait:
                until.synchronize()
            if until.query():
                self.sums[phase] += since.elapsed_time(until) / 1000
            else:
                self.pending.append((phase, since, until))

    def seconds(self) -> dict[str, float]:
        """Return the sums; waits for the device."""
        self._read(wait=True)
        return dict(self.sums)

    def take(self, phase: str) -> float:
        """Return the seconds of a phase that have been measured since the last call; does not wait for the device."""
        self._read(wait=False)
        return self.sums.pop(phase, 0.0)

    def __deepcopy__(self, memo: Any) -> "Clock":
        # Events cannot be copied, sums can.
        copy = Clock()
        copy.sums.update(self.seconds())
        return copy
