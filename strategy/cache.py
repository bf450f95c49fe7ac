"""Keys and values of one layer in a transformers cache, across its versions."""

from typing import Any

from torch import Tensor


def length(cache: Any) -> int:
    """How many tokens the cache holds; 0 for None. The tuples of old count too."""
    if not cache:
        return 0
    return int(cache.get_seq_length() if hasattr(cache, "get_seq_length") else cache[0][0].shape[2])


def read(cache: Any, layer: int) -> tuple[Tensor, Tensor]:
    """Keys and values [B, key heads, L, head width] of a layer."""
    if hasattr(cache, "layers"):
        return cache.layers[layer].keys, cache.layers[layer].values
    return cache.key_cache[layer], cache.value_cache[layer]


def write(cache: Any, layer: int, keys: Tensor, values: Tensor) -> None:
    """Replace a layer's keys and values."""
    if hasattr(cache, "layers"):
        cache.layers[layer].keys, cache.layers[layer].values = keys, values
    else:
        cache.key_cache[layer], cache.value_cache[layer] = keys, values
