"""Methods of the Qwens that read token ids and sizes of pictures, on copies that the host has already.

On a GPU, the stock methods wait again and again for what was given to it before, such as the vision tower.
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from torch import Tensor, nn

from strategy.kernels.transfers import host_copy, to_device


def _stock(name: str, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """Call the method of a module's class with tensors of integers on the CPU, and all else as it is."""

    def on_host(given: Any) -> Any:
        return host_copy(given) if isinstance(given, Tensor) and not given.is_floating_point() else given

    method = getattr(type(module), name)
    return method(module, *map(on_host, args), **{key: on_host(value) for key, value in kwargs.items()})


def _rope_index(module: Any, input_ids: Tensor | None = None, *args: Any, **kwargs: Any) -> tuple[Tensor, ...]:
    """Return what `get_rope_index` does, on the device of the token ids."""
    if input_ids is None:  # positions are those of the mask
        counted: tuple[Tensor, ...] = type(module).get_rope_index(module, None, *args, **kwargs)
        return counted
    found = _stock("get_rope_index", module, input_ids, *args, **kwargs)
    return tuple(to_device(tensor, input_ids.device) for tensor in found)


def _placeholder_mask(
    module: Any,
    input_ids: Tensor | None,
    inputs_embeds: Tensor,
    image_features: Tensor | None = None,
    video_features: Tensor | None = None,
) -> tuple[Tensor, ...]:
    """Return what `get_placeholder_mask` does: which of [B, L, C] are pictures', and which are videos'."""
    tokens = module.config.image_token_id, module.config.video_token_id
    given, width = (image_features, video_features), inputs_embeds.shape[-1]
    if input_ids is None or not all(
        features is None or features.shape == (int((host_copy(input_ids) == token).sum()), width)
        for token, features in zip(tokens, given, strict=True)
    ):  # the stock method looks for the tokens' embeddings, or says what is wrong
        stock: tuple[Tensor, ...] = type(module).get_placeholder_mask(module, input_ids, inputs_embeds, *given)
        return stock
    masks = ((input_ids == token)[..., None].expand_as(inputs_embeds) for token in tokens)
    return tuple(mask.to(inputs_embeds.device) for mask in masks)


HOST_METHODS: Mapping[str, Callable[..., Any]] = {
    "get_rope_index": _rope_index,
    "get_placeholder_mask": _placeholder_mask,
    "get_image_features": partial(_stock, "get_image_features"),
    "get_video_features": partial(_stock, "get_video_features"),
}
