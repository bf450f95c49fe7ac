"""A second CUDA stream."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch


class SideStream:
    """A second stream: what runs there overlaps with what follows on the first stream, in a capture too.

    On a CPU everything runs at once.
    """

    def __init__(self, device: torch.device) -> None:
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self.busy = False

    @contextmanager
    def scope(self) -> Iterator[None]:
        """Run what is inside on this stream, once everything before it is done."""
        if self.stream is None:
            yield
            return
        self.stream.wait_stream(torch.cuda.current_stream())
        self.busy = True
        with torch.cuda.stream(self.stream):
            yield

    def wait(self) -> None:
        """Let what follows wait for everything on this stream; until then, its inputs must be kept."""
        # A capture must not wait for a stream on which it has put nothing.
        if self.stream is not None and self.busy:
            torch.cuda.current_stream().wait_stream(self.stream)
            self.busy = False
