"""What a thread's forward call leaves for the hooks that come later in it."""

import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from strategy.backbone import Layout
from strategy.prefill import Prefill
from strategy.slots import Slots


@dataclass
class Answer:
    """A greedy answer that is made by the fast path.

    limit: how many tokens it may have. fits: whether its prompts are prefilled by one program. lengths: theirs. state:
    that of the prefill. slots: the cache to decode on. held: how many of its slots the longest prompt takes.
    """

    limit: int
    fits: bool = False
    lengths: Sequence[int] = ()
    state: Prefill | None = None
    slots: Slots | None = None
    held: int = 0


class Call(threading.local):
    """The state of the forward call that a thread is in; threads that share a model do not share it.

    layout, closing: what the entry told of the prompts. prefill: the state of a prompt with visual tokens. part:
    what the call is counted as, "prefill" or "decode", None for a text; since: when the decoder began. vision:
    what a vision module was entered with. reading: the last tokens of prompts without their questions, while such
    are read; prior: the attention they paid. answer: what the fast path makes, None outside of it.
    """

    layout: Layout | None = None
    closing: Sequence[int] | None = None
    prefill: Prefill | None = None
    part: str | None = None
    since: Any = None
    vision: Any = None
    reading: Tensor | None = None
    prior: Tensor | None = None
    answer: Answer | None = None

    def __reduce__(self) -> tuple[type["Call"], tuple[()]]:
        # A copy of a model is in no forward call.
        return Call, ()
