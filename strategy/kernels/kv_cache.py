"""Keys and values of one layer in a transformers cache, across its versions."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

# Names of a layer's cache among its keyword arguments: since transformers 4.56, and before.
NAMES = ("past_key_values", "past_key_value")


def find(kwargs: Mapping[str, Any]) -> Any:
    """Return the cache among the keyword arguments of a forward call; None if there is none."""
    return next((kwargs[name] for name in NAMES if kwargs.get(name) is not None), None)


def length(cache: Any) -> int:
    """Return how many tokens a cache holds; 0 for None. Older tuples of tensors count too."""
    if not cache:
        return 0
    return int(cache.get_seq_length() if hasattr(cache, "get_seq_length") else cache[0][0].shape[2])


def read(cache: Any, layer: int) -> tuple[Tensor, Tensor]:
    """Return keys and values [B, key heads, L, head width] of a layer."""
    if hasattr(cache, "layers"):
        return cache.layers[layer].keys, cache.layers[layer].values
    return cache.key_cache[layer], cache.value_cache[layer]


def write(cache: Any, layer: int, keys: Tensor, values: Tensor) -> None:
    """Replace a layer's keys and values."""
    if hasattr(cache, "layers"):
        own = cache.layers[layer]
        own.keys, own.values = keys, values
        if hasattr(own, "cumulative_length"):  # the layer sees a window, and counts apart from what it holds
            own.cumulative_length = keys.shape[-2]
    else:
        cache.key_cache[layer], cache.value_cache[layer] = keys, values
