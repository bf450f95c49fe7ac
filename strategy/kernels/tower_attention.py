"""The attention of vision towers that pack pictures into one sequence, by a kernel that takes all sizes."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from strategy.kernels.attention import apply_rotary
from strategy.kernels.packed_attention import packed_attention


def packed_forward(query: str, output: str, heads: int, rotary: str, ends: str) -> Callable[..., Any]:
    """Return the forward call of modules that compute attention inside pieces of one sequence [L, C].

    Args:
        query: Path of the module's part that projects queries, keys and values.
        output: Path of the part that projects what the heads return.
        heads: How many heads there are.
        rotary: Name of the argument with the cosines and sines that rotate the tokens.
        ends: Name of the argument with the bounds of the pieces.
    """

    def forward(attention: nn.Module, hidden: Tensor, **kwargs: Any) -> Any:
        if torch.is_grad_enabled():  # the kernel has no gradient
            return type(attention).forward(attention, hidden, **kwargs)
        projected = attention.get_submodule(query)(hidden).unflatten(-1, (3, heads, -1))
        cos, sin = (table.float()[None] for table in kwargs[rotary])
        turned = [
            apply_rotary(projected[:, kind].transpose(0, 1)[None].float(), cos, sin)[0].transpose(0, 1)
            for kind in (0, 1)
        ]
        query_and_key = [each.to(projected.dtype).contiguous() for each in turned]
        seen = packed_attention(*query_and_key, projected[:, 2], kwargs[ends])
        return attention.get_submodule(output)(seen.flatten(1))

    return forward
