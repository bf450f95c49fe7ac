"""The prompt without its question: what attention would be paid before anything is asked."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from strategy.attention import rows_of
from strategy.prefill import Frames

# What of a decoder's forward call does not go into one that is broken off in the middle.
DROPPED = ("past_key_values", "output_attentions", "output_hidden_states", "return_dict")


class EnoughError(Exception):
    """Breaks off a forward call once its layers have told what they were run for."""


def question_free(
    call: Mapping[str, Any],
    tokens: Tensor,
    layout: Sequence[Sequence[Frames]],
    closing: Sequence[int],
    last: Sequence[int],
) -> tuple[dict[str, Any], Tensor]:
    """The same prompts up to the first token behind their visual ones, and their last `closing` tokens.

    call: the keyword arguments of a decoder's forward call. tokens: what it is given, [B, S] or [B, S, C]. last:
    each prompt's last token. Returns the keyword arguments of the shorter call, padded on the right, and the index
    of each sample's last token, [B, 1]. What stays keeps its tokens; positions are those that follow the picture
    directly.
    """
    rows = []
    for spans, own, end in zip(layout, closing, last, strict=True):
        behind = max((span.starts[-1] + span.frame for span in spans), default=0)
        rows.append([*range(behind + 1), *range(max(behind + 1, end + 1 - own), end + 1)])
    most = max(map(len, rows))
    index = torch.tensor([row + [0] * (most - len(row)) for row in rows], device=tokens.device)
    real = torch.tensor([[1] * len(row) + [0] * (most - len(row)) for row in rows], device=tokens.device)
    kept = {name: value for name, value in call.items() if name not in DROPPED} | {"use_cache": False}
    short = kept | reordered(kept, tokens, index, real.bool())
    if call.get("position_ids") is not None:
        # Text counts on by one a token, in all of its kinds.
        short["position_ids"] = call["position_ids"][..., :most]
    return short, real.sum(1, keepdim=True) - 1


def reordered(call: Mapping[str, Any], tokens: Tensor, index: Tensor, real: Tensor) -> dict[str, Any]:
    """Those of a decoder's keyword arguments that go with its prompts, for the tokens at `index` [B, L] of them.

    tokens: see `question_free`. real: [B, L], False where the index only fills up.
    """
    taken: dict[str, Any] = {}
    for name, value in call.items():
        if name == "position_ids" and value is not None:
            taken[name] = value.expand(*value.shape[:-2], len(index), -1).take_along_dim(
                index[(None,) * (value.dim() - 2)], -1
            )
        elif name == "cache_position" and value is not None:
            taken[name] = torch.arange(index.shape[1], device=value.device)
        elif torch.is_tensor(value) and value.shape[:2] == tokens.shape[:2]:
            rows = rows_of(value, index)
            taken[name] = rows & real if rows.dtype == torch.bool else rows
    mask = taken.get("attention_mask")
    taken["attention_mask"] = real.long() if mask is None else mask * real.to(mask.dtype)
    return taken
