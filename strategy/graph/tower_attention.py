"""The attention of vision towers that pack pictures into one sequence, by a kernel that takes all sizes."""

from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

from strategy.backbone import EncoderSpec
from strategy.kernels.attention import apply_rotary
from strategy.kernels.layer_spec import part
from strategy.kernels.packed_attention import packed_attention
from strategy.pruning.patch import ModelPatch


def replace_attention(patch: ModelPatch, spec: EncoderSpec | None) -> None:
    """Replace the forward calls of a tower's attention modules, see `EncoderSpec.attention`.

    Modules whose forward call somebody else has replaced, such as accelerate, stay as they are, and so does a tower
    whose description is None or has no `attention`.
    """
    if not spec or spec.attention is None or spec.output is None or spec.rotary is None or spec.ends is None:
        return
    query, output = (path.removeprefix(f"{spec.attention}.") for path in (spec.query, spec.output))
    heads, rotary, ends = spec.heads, spec.rotary, spec.ends

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

    for layer in spec.layers:
        attention = part(layer, spec.attention)
        if "forward" not in vars(attention):
            # torch compiles methods of one function once.
            patch.replace(attention, "forward", MethodType(forward, attention))
