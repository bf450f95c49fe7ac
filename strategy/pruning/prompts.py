"""Keyword arguments of a decoder that go with its prompts."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from strategy.kernels.attention import gather_rows
from strategy.pruning.narrowing import narrow_mask


def prompt_tokens(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor:
    """Return what the tokens of a forward call are given as, [B, L, C] or [B, L].

    Raises:
        ValueError: They are a positional argument.
    """
    if args:
        raise ValueError("while it is pruned, a decoder takes keyword arguments only, such as inputs_embeds=")
    embeddings = kwargs.get("inputs_embeds")
    return kwargs["input_ids"] if embeddings is None else embeddings


def gather_prompt_kwargs(kwargs: Mapping[str, Any], tokens: Tensor, index: Tensor, real: Tensor) -> dict[str, Any]:
    """Gather the keyword arguments that have an entry for each token, at some of the tokens.

    Args:
        kwargs: The keyword arguments of a decoder's forward call.
        tokens: What its tokens are given as, [B, S] or [B, S, C].
        index: Sequence indices [B, L] of the tokens to gather.
        real: [B, L], False at padding.

    Returns:
        The gathered arguments, with an attention mask.
    """
    gathered: dict[str, Any] = {}
    for name, value in kwargs.items():
        if name == "position_ids" and value is not None:
            gathered[name] = value.expand(*value.shape[:-2], len(index), -1).take_along_dim(
                index[(None,) * (value.dim() - 2)], -1
            )
        elif name == "cache_position" and value is not None:
            gathered[name] = torch.arange(index.shape[1], device=value.device)
        elif torch.is_tensor(value) and value.shape[:2] == tokens.shape[:2]:
            rows = gather_rows(value, index)
            gathered[name] = rows & real if rows.dtype == torch.bool else rows
    mask = kwargs.get("attention_mask")
    if isinstance(mask, Mapping):  # one for each kind of layer
        gathered["attention_mask"] = {name: narrow_mask(own, index, ~real, True) for name, own in mask.items()}
        return gathered
    if mask is not None and mask.dim() == 4:
        gathered["attention_mask"] = narrow_mask(mask, index, ~real, True)
        return gathered
    mask = gathered.get("attention_mask")
    gathered["attention_mask"] = real.long() if mask is None else mask * real.to(mask.dtype)
    return gathered
