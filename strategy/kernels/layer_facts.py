"""What a decoder layer costs, and which processes hold it, from its weights."""

from math import prod
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from strategy.kernels.layer_spec import LayerSpec, part

TP_GROUP_ATTR = "mp_group"  # where DeepSpeed's tensor parallelism leaves the group on a projection that it has split


def whole_shape(weight: Tensor) -> torch.Size:
    """Return the shape of a weight, also where ZeRO stage 3 leaves only a share of the weight between passes."""
    return getattr(weight, "ds_shape", weight.shape)


def token_cost(layer: nn.Module, experts: int) -> int:
    """Return the multiply-adds of one token with a layer's weights, `experts` of each stack of experts."""
    shapes = [shape for parameter in layer.parameters() if len(shape := whole_shape(parameter)) > 1]
    return sum(prod(shape) if len(shape) == 2 else experts * prod(shape[1:]) for shape in shapes)


def pair_cost(layer: nn.Module, spec: LayerSpec) -> int:
    """Return the multiply-adds of attention in a layer for one token that sees one token; 0 in a linear layer."""
    return 0 if spec.linear else 2 * whole_shape(part(layer, spec.output).weight)[1]


def is_zero_sharded(layers: nn.ModuleList) -> bool:
    """Return whether a process holds the layers' weights only while they run, gathered by ZeRO stage 3."""
    return hasattr(next(layers.parameters()), "ds_shape")


def tp_group_of(layers: Any) -> ProcessGroup | None:
    """Return the ranks that the heads of the layers are split over, in the heads' order; None if they are not split."""
    return next((getattr(each, TP_GROUP_ATTR) for each in layers[0].modules() if hasattr(each, TP_GROUP_ATTR)), None)
