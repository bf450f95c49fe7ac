"""Prompts of similar lengths in one shape, so that few graphs serve all lengths of text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from strategy.backbone import Layout, Span
from strategy.kernels.transfers import host_copy, tensor_on
from strategy.pruning.layout import resolve_layout
from strategy.pruning.prompts import gather_prompt_kwargs
from strategy.pruning.state import PrefillState

PROMPT_LENGTH_MULTIPLE = 16  # tokens; prompts are padded to a multiple


class Bucket(NamedTuple):
    """Prompts as programs can prefill them.

    layout: Their spans, moved. lengths: Of the prompts without padding.
    """

    layout: list[list[Span]]
    lengths: list[int]


def bucket_prompts(layout: Layout, kwargs: dict[str, Any], tokens: Tensor) -> Bucket | str:
    """Move prompts to the left of a bucket, in `kwargs`, if programs can prefill them.

    Args:
        layout: The spans of each sample.
        kwargs: The keyword arguments of the decoder's forward call.
        tokens: What its tokens are given as.

    Returns:
        The bucket; or why no program can prefill the prompts.

    Raises:
        ValueError: The layout does not fit the prompts.
    """
    mask = kwargs.get("attention_mask")
    if mask is not None and mask.dim() != 2:
        return f"the attention mask has {mask.dim()} dimensions"
    rows = torch.ones(tokens.shape[:2]).tolist() if mask is None else host_copy(mask).tolist()
    first = [row.index(1) if 1 in row else len(row) for row in rows]
    lengths = [int(sum(row)) for row in rows]
    reasons = {
        "no prompt has visual tokens": not any(layout),
        "the prompts come without embeddings or without positions": tokens.dim() < 3
        or kwargs.get("position_ids") is None,
        "a prompt is empty": not all(lengths),
        "there is padding inside a prompt": not all(
            all(row[at : at + size]) for row, at, size in zip(rows, first, lengths, strict=True)
        ),
    }
    if reason := next((reason for reason, applies in reasons.items() if applies), None):
        return reason
    # Behind padding, a picture would no longer be the end of its prompt.
    resolve_layout(layout, *tokens.shape[:2])
    at = torch.arange(padded_length(max(lengths)), device=tokens.device)
    bounds = tensor_on(tokens.device, [first, lengths])[..., None]
    index = (bounds[0] + at).clamp(max=tokens.shape[1] - 1)
    kwargs |= gather_prompt_kwargs(kwargs, tokens, index, at < bounds[1])
    moved = [
        [Span(_moved(span[0], -begin), *span[1:]) for span in spans] for spans, begin in zip(layout, first, strict=True)
    ]
    return Bucket(moved, lengths)


def padded_length(length: int) -> int:
    """Return how long a bucket for prompts of such a length is."""
    return -(-length // PROMPT_LENGTH_MULTIPLE) * PROMPT_LENGTH_MULTIPLE


def _moved(start: int | Sequence[int], by: int) -> int | tuple[int, ...]:
    return tuple(each + by for each in start) if isinstance(start, Sequence) else start + by


def graph_inputs(state: PrefillState) -> list[Tensor]:
    """Return, before the first prune, the tensors that differ between prompts with the same shapes and grids."""
    own = [
        tensor
        for group in state.groups
        for tensor in (group.visual, group.text, group.question_mask, *group.encoder, *group.joint)
    ]
    prior = [] if state.prior is None else [state.prior]
    return [state.real, state.last, state.position, *own, *state.added, *prior]


def with_graph_inputs(state: PrefillState, tensors: Sequence[Tensor]) -> PrefillState:
    """Return a state that begins alike with other such tensors; what is done with it leaves `state` unchanged."""
    rest = iter(tensors)
    real, last, position = (next(rest) for _ in range(3))
    groups = [
        replace(
            group,
            visual=next(rest),
            text=next(rest),
            question_mask=next(rest),
            encoder=tuple(next(rest) for _ in group.encoder),
            joint=tuple(next(rest) for _ in group.joint),
            memo={},
        )
        for group in state.groups
    ]
    added = [next(rest) for _ in state.added]
    return PrefillState(groups, real, last, position, added=added, prior=next(rest, None))
