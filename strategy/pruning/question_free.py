"""The prompt without its question: the attention that is paid before anything is asked."""

from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor, nn

from strategy.backbone import Layout
from strategy.kernels import kv_cache
from strategy.kernels.transfers import tensor_on
from strategy.metrics.meter import CostMeter
from strategy.metrics.thread_state import ThreadState
from strategy.pruning.layout import ResolvedSpan, resolve_layout
from strategy.pruning.prompts import gather_prompt_kwargs, prompt_tokens

# Arguments of a decoder's forward call that a call which stops in the middle does not take.
DROPPED = (*kv_cache.NAMES, "output_attentions", "output_hidden_states", "return_dict")


class StopForward(Exception):  # noqa: N818  it signals no error
    """Ends a forward call once the layers that it was made for have run."""


class _Current(ThreadState):
    """The pass that a thread is in.

    template: Tokens of a template behind each question. last: The last tokens of the shorter prompts, while these run.
    attention: What these tokens paid.
    """

    template: Sequence[int] | None = None
    last: Tensor | None = None
    attention: Tensor | None = None


class QuestionFreePass:
    """Runs the first layers over prompts without their questions, for the attention of their last tokens.

    Args:
        decoder: The decoder, whose layer before the first stage calls `capture` while `active`.
        layers: How many layers run.
        meter: Counts the pass as scoring.
        strategy: The name of the strategy that wants it.
        sharded: Whether other processes take part in every layer's pass.
    """

    def __init__(self, decoder: nn.Module, layers: int, meter: CostMeter, strategy: str, sharded: bool) -> None:
        self.decoder, self.layers, self.meter, self.strategy, self.sharded = decoder, layers, meter, strategy, sharded
        self.current = _Current()

    @property
    def active(self) -> bool:
        """Return whether the forward call of this thread is such a pass."""
        return self.current.last is not None

    @property
    def last(self) -> Tensor:
        """Return the positions [B, 1] of the shorter prompts' last tokens."""
        assert self.current.last is not None
        return self.current.last

    def set_template(self, template: Sequence[int] | None) -> None:
        """Keep how many tokens of a template follow the question in each prompt, until `run`."""
        self.current.template = template

    def run(self, kwargs: Mapping[str, Any], layout: Layout, tokens: Tensor, last: Tensor) -> Tensor | None:
        """Return the attention [B, heads, S'] that the last tokens of the shorter prompts pay.

        Args:
            kwargs: The keyword arguments of the decoder's forward call.
            layout: The spans of each sample.
            tokens: What the tokens are given as, [B, S] or [B, S, C].
            last: [B, 1], each prompt's last token.

        Raises:
            ValueError: The attention mask has neither two dimensions nor four.
        """
        mask = kwargs.get("attention_mask")
        if isinstance(mask, Tensor) and mask.dim() not in (2, 4):
            raise ValueError(
                f"{self.strategy} needs an attention_mask [B, S] or [B, 1, S, S], not one of {mask.dim()} dimensions"
            )
        (batch, length), since = tokens.shape[:2], self.meter.record.clock.start(tokens.device)
        spans, template = resolve_layout(layout, batch, length), self.current.template or [0] * batch
        shorter, self.current.last = without_question(kwargs, tokens, spans, template, last[:, 0].tolist())
        try:
            with torch.no_grad(), suppress(StopForward):
                self.decoder(**shorter)
        finally:
            self.current.last, self.current.template = None, None
        self.meter.prefill(batch, [prompt_tokens((), shorter).shape[1]] * self.layers, phase="scoring")
        self.meter.record.clock.stop("scoring", since)
        attention, self.current.attention = self.current.attention, None
        return attention

    def capture(self, attention: Tensor) -> None:
        """Keep the attention [B, heads, 1, S'] of the last tokens, and end the forward call.

        Raises:
            StopForward: Always, except if other processes gather the layers that follow, too.
        """
        self.current.attention = attention[:, :, 0]
        if not self.sharded:
            raise StopForward

    def clear(self) -> None:
        """Forget the attention that a keyboard interrupt left."""
        self.current.attention = None


def without_question(
    kwargs: Mapping[str, Any],
    tokens: Tensor,
    layout: Sequence[Sequence[ResolvedSpan]],
    template: Sequence[int],
    last: Sequence[int],
) -> tuple[dict[str, Any], Tensor]:
    """Shorten prompts to the first token behind their visual ones, and their last tokens, those of a template.

    What stays keeps its tokens; positions are those that follow the picture directly.

    Args:
        kwargs: The keyword arguments of a decoder's forward call.
        tokens: What its tokens are given as, [B, S] or [B, S, C].
        layout: The spans of each sample.
        template: How many of each prompt's last tokens stay.
        last: Each prompt's last token.

    Returns:
        The keyword arguments of the shorter call, padded on the right, and the index [B, 1] of each sample's last
        token.
    """
    rows = []
    for spans, own, end in zip(layout, template, last, strict=True):
        behind = max((span.starts[-1] + span.frame_size for span in spans), default=0)
        rows.append([*range(behind + 1), *range(max(behind + 1, end + 1 - own), end + 1)])
    most = max(map(len, rows))
    index = tensor_on(tokens.device, [row + [0] * (most - len(row)) for row in rows])
    real = tensor_on(tokens.device, [[1] * len(row) + [0] * (most - len(row)) for row in rows])
    kept = {name: value for name, value in kwargs.items() if name not in DROPPED} | {"use_cache": False}
    shorter = kept | gather_prompt_kwargs(kept, tokens, index, real.bool())
    if kwargs.get("position_ids") is not None:
        # Positions of text increase by one with each token, in all of their kinds.
        shorter["position_ids"] = kwargs["position_ids"][..., :most]
    return shorter, real.sum(1, keepdim=True) - 1
