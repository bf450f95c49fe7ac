"""The state that the hooks of one forward call share."""

from __future__ import annotations

from torch import Tensor

from strategy.backbone import Layout
from strategy.metrics.thread_state import ThreadState
from strategy.pruning.state import PrefillState


class ForwardContext(ThreadState):
    """The forward call that a thread is in.

    layout: What the entry showed. padding: The mask [B, S] of which the entry makes others for the decoder. prompt: The
    state of the prompts that the decoder runs. pruned: The same state, if some of the prompts have visual tokens.
    """

    layout: Layout | None = None
    padding: Tensor | None = None
    prompt: PrefillState | None = None
    pruned: PrefillState | None = None
