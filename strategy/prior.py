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
    short = {name: value for name, value in call.items() if name not in DROPPED} | {"use_cache": False}
    for name, value in short.items():
        if name == "position_ids" and value is not None:
            # Text counts on by one a token, in all of its kinds.
            short[name] = value[..., :most]
        elif name == "cache_position" and value is not None:
            short[name] = value[:most]
        elif torch.is_tensor(value) and value.shape[:2] == tokens.shape[:2]:
            taken = rows_of(value, index)
            short[name] = taken & real.bool() if taken.dtype == torch.bool else taken
    mask = short.get("attention_mask")
    short["attention_mask"] = real if mask is None else mask * real.to(mask.dtype)
    return short, real.sum(1, keepdim=True) - 1
