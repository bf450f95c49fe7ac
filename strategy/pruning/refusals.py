"""What may be asked of a model, but not while prompts are pruned: each is refused with one sentence."""

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn

from strategy.kernels import kv_cache
from strategy.kernels.arguments import named_arguments

# Options of `generate` whose loops read the prompt in parts, or cut and copy the cache by the prompt's whole length.
LOOPS = (
    "assistant_model",
    "prompt_lookup_num_tokens",
    "assistant_early_exit",
    "is_assistant",
    "penalty_alpha",
    "dola_layers",
    "prefill_chunk_size",
)
CACHES = (None, "dynamic", "dynamic_full")  # values of `cache_implementation` whose caches grow
UNSUPPORTED = "is not supported while a model is pruned"


def refuse_cache(cache: Any) -> None:
    """Raise ValueError for a cache that cannot be trimmed."""
    if not kv_cache.can_trim(cache):
        raise ValueError(
            f"past_key_values: a {type(cache).__name__} {UNSUPPORTED}: use a DynamicCache, or leave it out"
        )


def refuse_loss(model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
    """Raise ValueError for arguments of a model's forward call that need the outputs of all tokens; a hook.

    Args:
        model: The model.
        args: The positional arguments.
        kwargs: The keyword arguments.

    Raises:
        ValueError: `labels` are given, or `logits_to_keep` are indices of tokens.
    """
    given = named_arguments(model.forward, args) | dict(kwargs)
    if given.get("labels") is not None:
        raise ValueError(
            f"labels= {UNSUPPORTED}, since pruned tokens have no logits: leave it out, or detach the model"
        )
    if isinstance(given.get("logits_to_keep"), Tensor):
        raise ValueError(
            f"logits_to_keep= as indices of tokens {UNSUPPORTED}, since pruned tokens have no logits: give the number "
            "of last tokens, or detach the model"
        )


def generate(model: Any, stock: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
    """Call a model's `generate`, unless its options cannot be met.

    Args:
        model: The model.
        stock: Its `generate`.
        args: The positional arguments.
        kwargs: The keyword arguments.

    Raises:
        ValueError: An option asks for one of LOOPS, or for a cache that is none of CACHES.
    """
    given = named_arguments(stock, args) | kwargs
    config = given.get("generation_config") or model.generation_config
    for name in LOOPS:
        if value := given.get(name, getattr(config, name, None)):
            shown = type(value).__name__ if isinstance(value, nn.Module) else value
            raise ValueError(
                f"{name}={shown} {UNSUPPORTED}: use greedy decoding, sampling or beam search, or detach the model"
            )
    cache = given.get("cache_implementation", getattr(config, "cache_implementation", None))
    if cache not in CACHES:
        raise ValueError(
            f"cache_implementation={cache!r} {UNSUPPORTED}: use 'dynamic', or leave it out, or detach the model"
        )
    return stock(*args, **kwargs)
