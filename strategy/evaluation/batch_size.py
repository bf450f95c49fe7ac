"""How many questions are answered at a time: a number that was given, or as many as the GPU's memory allows.

The number is found by answering: the first batch has one question, and each further one twice as many as the batch
before, as long as the memory of the batch before allows that. So nothing is computed for the number alone.
"""

from collections.abc import Callable, Iterable
from typing import Any, Protocol

import torch
from torch import nn
from torch.distributed import ProcessGroup

from strategy.attach import leave_lack_of_memory
from strategy.distributed import collectives
from strategy.options import count

AUTO = "auto"
LARGEST = 64  # larger batches were not measured here
# Of the memory beside the model that a batch may be expected to take. Captured graphs hold about as much again, later
# batches may have larger pictures or longer answers, and an allocator leaves gaps.
SHARE = 0.4


class Memory(Protocol):
    """Memory that a batch takes."""

    def begin(self) -> None:
        """Begin to watch what is taken."""

    def share(self) -> float:
        """Return the largest share of the memory, beside what was held at the beginning, that was taken since."""


class GpuMemory:
    """The memory of the GPUs that hold a model, of which the fullest counts.

    Args:
        devices: The GPUs.
    """

    def __init__(self, devices: Iterable[torch.device]) -> None:
        self._held = dict.fromkeys(devices, 0)

    def begin(self) -> None:
        """Begin to watch what is taken."""
        for device in self._held:
            torch.cuda.reset_peak_memory_stats(device)
            self._held[device] = torch.cuda.memory_allocated(device)

    def share(self) -> float:
        """Return the largest share of a GPU's memory, beside what was held at the beginning, that was taken since."""
        shares = []
        for device, held in self._held.items():
            free, _ = torch.cuda.mem_get_info(device)
            room = free + torch.cuda.memory_reserved(device) - held
            shares.append((torch.cuda.max_memory_allocated(device) - held) / max(1, room))
        return max(shares)


def _tell_nobody(level: str, sentence: str) -> None:
    pass


class BatchSize:
    """How many questions are answered at a time.

    Args:
        given: The number, or AUTO.
        most: The largest number that is tried with AUTO.
        memory: What a batch takes; None where that cannot be measured. Then AUTO is 1.
        agree: Returns whether a decision is yes on all ranks that share the model, each of which calls it. None if no
            other rank does.
        tell: Gets a level of the log and a sentence, for each number that is chosen with AUTO.

    Attributes:
        size: The number.
        is_auto: Whether the number is chosen here.
        growing: Whether larger numbers are still to be tried.
        asked: How many questions the model is being asked; whoever asks sets it.
    """

    def __init__(
        self,
        given: int | str,
        most: int = LARGEST,
        memory: Memory | None = None,
        agree: Callable[[bool], bool] | None = None,
        tell: Callable[[str, str], None] = _tell_nobody,
    ) -> None:
        self.is_auto = given == AUTO
        self.size = 1 if self.is_auto else int(given)
        self.most, self.memory, self.agree, self.tell = most, memory, agree, tell
        self.growing, self.asked = self.is_auto, 0
        if memory is None:
            self._settle("since only a GPU's memory is measured")
        elif most == 1:
            self._settle("the most that are allowed")

    @classmethod
    def for_model(
        cls,
        model: nn.Module,
        group: ProcessGroup | None,
        given: int | str,
        most: int,
        tell: Callable[[str, str], None],
    ) -> "BatchSize":
        """Return how many questions a model answers at a time, to which a lack of memory of the graph engine is left.

        Args:
            model: The model, attached.
            group: The ranks that share the model, if others do. The first of them tells.
            given, most, tell: As above.
        """
        devices = [parameter.device for parameter in model.parameters()]
        gpus = {device for device in devices if device.type == "cuda"}

        def all_agree(own: bool) -> bool:
            return bool(collectives.all_reduce_min([own], devices[0], group)[0])

        if not collectives.is_first_rank(group):
            tell = _tell_nobody
        chosen = cls(given, most, GpuMemory(gpus) if gpus else None, all_agree if group else None, tell)
        leave_lack_of_memory(model, chosen.can_shrink)
        return chosen

    def begin(self) -> None:
        """Begin to measure the next batch, while larger ones are still to be tried."""
        if self.growing and self.memory is not None:
            self.memory.begin()

    def grow(self, answered: int) -> None:
        """Try twice as many questions from now on, if the batch that was answered last allows that.

        Args:
            answered: How many questions that batch had. Fewer than `size` say nothing.
        """
        if not self.growing or self.memory is None or answered < self.size:
            return
        share = self.memory.share()
        fits = 2 * share <= SHARE
        if not (self.agree(fits) if self.agree else fits):
            self._settle(f"which take {share:.0%} of the GPU's memory beside the model")
            return
        self.size = min(2 * self.size, self.most)
        if self.size == self.most:
            self._settle("the most that are allowed")

    def can_shrink(self) -> bool:
        """Return whether fewer questions may be asked at a time if memory runs out.

        Other ranks that share the model would wait in the middle of a pass.
        """
        return self.is_auto and self.agree is None and min(self.asked, self.size) > 1

    def shrink(self) -> bool:
        """Ask half as many questions at a time from now on, since memory ran out; return whether that is possible."""
        if not self.can_shrink():
            return False
        too_many = min(self.asked, self.size)
        self.size, self.growing = too_many // 2, False
        self.tell("WARNING", f"batch_size=auto: {self._words()} from now on, since memory ran out with {too_many}")
        return True

    def finish(self) -> None:
        """Say so if there were too few questions to find the number."""
        if self.growing and self.size > 1:
            self.tell("INFO", f"batch_size=auto: up to {self._words()}, since there were too few to find how many fit")

    def _settle(self, why: str) -> None:
        if self.growing:
            self.tell("INFO", f"batch_size=auto: {self._words()}, {why}")
        self.growing = False

    def _words(self) -> str:
        return f"{self.size} question{'s' * (self.size > 1)} at a time"


def read_batch_size(name: str, value: Any) -> int | str:
    """Read a number of questions, or AUTO."""
    if isinstance(value, str) and value.strip().lower() == AUTO:
        return AUTO
    try:
        return int(count(name, value))
    except ValueError:
        raise ValueError(
            f"{name}={value!r}: allowed are a whole number from 1 up, and auto, for as many questions as fit into the "
            "GPU's memory"
        ) from None


def take_batch_size(arguments: dict[str, Any]) -> tuple[int | str, int]:
    """Return how many questions a model is to answer at a time, or AUTO, and the largest number that AUTO may try.

    Args:
        arguments: Those of the model. `max_batch_size` is taken out, and `batch_size` becomes the number to begin with.

    Raises:
        ValueError: One of the two is not allowed, or `max_batch_size` has no effect.
    """
    given = read_batch_size("batch_size", arguments.get("batch_size", 1))
    most = arguments.pop("max_batch_size", None)
    arguments["batch_size"] = 1 if given == AUTO else given
    if most is None:
        return given, LARGEST
    if given != AUTO:
        raise ValueError(f"max_batch_size={most!r}: allowed with batch_size=auto only, not with batch_size={given}")
    return given, int(count("max_batch_size", most))
