"""A KV cache that holds less than its prompt: how it is trimmed, and how later forward calls continue on it."""

from typing import Any

import torch
from torch import Tensor

from strategy.kernels import kv_cache
from strategy.pruning.generate_call import GenerateCall
from strategy.pruning.prompts import prompt_tokens
from strategy.pruning.state import PrefillState, PrunedPrompt

# Where a cache keeps what it does not show of its prompt, so that copies of the cache keep it too.
ATTRIBUTE = "_pruned_prompt"
INPUTS = ("input_ids", "inputs_embeds")  # what the tokens of a call are given as, one or the other


def trim(cache: Any, depth: int, state: PrefillState) -> float:
    """Keep in every layer's cache what is left at the end of a prefill, and return the cache's bytes a sample."""
    size = 0
    for number in range(depth):
        positions = state.cache_positions(state.prunes_before(number))
        # Nothing can be taken out of a linear layer's state, which keeps what the pruned tokens wrote.
        if positions is not None and kv_cache.has_keys(cache, number):
            keys, values = kv_cache.read(cache, number)
            positions = positions.to(keys.device)
            keys, values = (tensor.take_along_dim(positions[:, None, :, None], 2) for tensor in (keys, values))
            kv_cache.write(cache, number, keys, values)
        size += kv_cache.num_bytes(cache, number)
    if (pruned := state.pruned_prompt()) is not None:
        setattr(cache, ATTRIBUTE, pruned)
    return size / len(state.real)


def forget(cache: Any) -> None:
    """Forget the pruned prompt of a cache that was emptied to be used again."""
    if hasattr(cache, ATTRIBUTE):
        delattr(cache, ATTRIBUTE)


def find_prompt(cache: Any, tokens: Tensor) -> PrunedPrompt | None:
    """Return the pruned prompt in a cache that holds as many samples as there are rows of tokens; None without one."""
    prompt: PrunedPrompt | None = getattr(cache, ATTRIBUTE, None)
    return prompt and prompt.fit(len(tokens), tokens.device)


def place_tokens(kwargs: dict[str, Any], cache: Any, prompt: PrunedPrompt, call: GenerateCall) -> None:
    """Give the tokens that follow a pruned prompt the positions that they would have without pruning.

    Args:
        kwargs: Keyword arguments of the entry's forward call, changed in place.
        cache: The cache among them.
        prompt: The pruned prompt in that cache.
        call: The `generate` that the call may belong to.
    """
    tokens, held = prompt_tokens((), kwargs), kv_cache.length(cache)
    mask, new, before = kwargs.get("attention_mask"), tokens.shape[1], held - prompt.real.shape[1]
    # A caller by hand does not give `cache_position`; `generate` does, up to transformers 5.2, and counts positions by
    # the pruned cache.
    generating = call.active or kwargs.get("cache_position") is not None
    padding = mask if mask is not None and mask.dim() == 2 else None
    gone = prompt.length - prompt.real.shape[1]
    # Since transformers 5.24, `generate` leaves out a mask of ones.
    uncut = mask is None and call.full_sequence if padding is None else padding.shape[1] == held + new
    if generating and uncut and gone < new:
        # `generate` passes all tokens that the cache does not hold, the pruned ones too.
        new -= gone
        kwargs |= {name: kwargs[name][:, -new:] for name in INPUTS if kwargs.get(name) is not None}
    later = torch.arange(before + new, device=tokens.device)[None]
    if padding is not None:
        later = padding[:, prompt.length :].long().cumsum(1) - 1
    if generating or kwargs.get("position_ids") is None:
        kwargs["position_ids"] = prompt.position + later[:, -new:].clamp(min=0)


def fit_token_types(kwargs: dict[str, Any], cache: Any) -> None:
    """Fit token types of a whole conversation to a pruned cache, whose pictures no later token belongs to."""
    types, tokens = kwargs.get("token_type_ids"), prompt_tokens((), kwargs)
    if types is not None:
        held = types.new_zeros(len(types), kv_cache.length(cache))
        kwargs["token_type_ids"] = torch.cat([held, types[:, -tokens.shape[1] :]], dim=1)


def fit_mask(kwargs: dict[str, Any], cache: Any, prompt: PrunedPrompt) -> None:
    """Fit the mask of the decoder's forward call, as long as the whole prompt and all that follows, to a pruned cache.

    Raises:
        ValueError: The mask has another length.
    """
    tokens = prompt_tokens((), kwargs)
    held, new, real = kv_cache.length(cache), tokens.shape[1], prompt.real
    mask, later = kwargs.get("attention_mask"), held + new - real.shape[1]
    if mask is None:
        mask = real.new_ones(len(real), later)
    elif mask.dim() == 2 and mask.shape[1] != prompt.length + later:
        raise ValueError(
            f"attention_mask is for {mask.shape[1]} tokens, but the prompt had {prompt.length} and {later} follow "
            "it: a call on a pruned cache takes the mask of all of them, and only the new tokens as its input"
        )
    if mask.dim() == 2:
        kwargs["attention_mask"] = torch.cat([real.to(mask.dtype), mask[:, -later:]], dim=1)
    if kwargs.get("cache_position") is not None:
        kwargs["cache_position"] = torch.arange(held, held + new, device=tokens.device)
