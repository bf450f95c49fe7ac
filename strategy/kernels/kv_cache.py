"""Keys and values of one layer in a transformers cache, across its versions."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

# Names of a cache among keyword arguments and outputs: since transformers 5.24, since 4.56, and before in layers.
NAMES = ("cache", "past_key_values", "past_key_value")


def find(kwargs: Mapping[str, Any]) -> Any:
    """Return the cache among the keyword arguments or the outputs of a forward call; None if there is none."""
    return next((kwargs[name] for name in NAMES if kwargs.get(name) is not None), None)


def length(cache: Any) -> int:
    """Return how many tokens a cache holds; 0 for None. Older tuples of tensors count too."""
    if not cache:
        return 0
    return int(cache.get_seq_length() if hasattr(cache, "get_seq_length") else cache[0][0].shape[2])


def can_trim(cache: Any) -> bool:
    """Return whether a cache holds of each layer what was written there and nothing else, so that it can be trimmed.

    Caches of a fixed size, quantized or offloaded ones and those that drop tokens by themselves do not; None and older
    tuples of tensors become caches that do.
    """
    if not hasattr(cache, "get_seq_length"):
        return True
    if not hasattr(cache, "layers"):
        return hasattr(cache, "key_cache") and not hasattr(cache, "window_length")
    # A linear layer has a state of fixed size, and no keys to trim.
    layers = [layer for layer in cache.layers if not hasattr(layer, "recurrent_states") or hasattr(layer, "keys")]
    layers.append(getattr(cache, "layer_class_to_replicate", None))
    kept_otherwise = any(
        getattr(layer, "is_compileable", False) or hasattr(layer, "residual_length") for layer in layers
    )
    return not kept_otherwise and not getattr(cache, "offloading", False)


def read(cache: Any, layer: int) -> tuple[Tensor, Tensor]:
    """Return keys and values [B, key heads, L, head width] of a layer."""
    if hasattr(cache, "layers"):
        return cache.layers[layer].keys, cache.layers[layer].values
    return cache.key_cache[layer], cache.value_cache[layer]


def has_keys(cache: Any, layer: int) -> bool:
    """Return whether a layer holds keys and values; a linear one holds a state of fixed size."""
    return not hasattr(cache, "layers") or getattr(cache.layers[layer], "keys", None) is not None


def num_bytes(cache: Any, layer: int) -> int:
    """Return the bytes of what a layer holds."""
    if has_keys(cache, layer):
        return sum(tensor.nbytes for tensor in read(cache, layer))
    states = (vars(cache.layers[layer]).get(name, {}).values() for name in ("conv_states", "recurrent_states"))
    return sum(state.nbytes for each in states for state in each if state is not None)


def write(cache: Any, layer: int, keys: Tensor, values: Tensor) -> None:
    """Replace a layer's keys and values."""
    if hasattr(cache, "layers"):
        own = cache.layers[layer]
        own.keys, own.values = keys, values
        if hasattr(own, "cumulative_length"):  # the layer sees a window, and counts apart from what it holds
            own.cumulative_length = keys.shape[-2]
    else:
        cache.key_cache[layer], cache.value_cache[layer] = keys, values
