"""Multiply-adds, counted from the shapes of executed operations.

A matrix product of [n, k] and [k, m] counts n * k * m. Attention counts in full, as torch counts it, although a causal
kernel needs to compute only half of it.
"""

from collections import ChainMap
from collections.abc import Mapping
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

ATEN = torch.ops.aten
# torch has no formula for its CPU kernel of attention, which computes what the GPU kernels do.
OWN_FORMULAS = {
    ATEN._scaled_dot_product_flash_attention_for_cpu: flop_registry[ATEN._scaled_dot_product_flash_attention]
}
BATCHED = (ATEN.bmm, ATEN.baddbmm)  # products with weights are others
FORMULAS: Mapping[Any, Any] = ChainMap(OWN_FORMULAS, flop_registry)


class MacCounter(TorchDispatchMode):
    """Counts the multiply-adds of whatever runs inside it, by torch's own formulas.

    Attributes:
        total: All of them.
        pairwise: Those of products of activations with each other, of which attention consists.
    """

    def __init__(self) -> None:
        super().__init__()
        self.total = self.pairwise = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        known = FORMULAS.get(func._overloadpacket)
        if known is None and func is not torch.ops.prim.device.default:
            with self:
                parts = func.decompose(*args, **kwargs or {})
            if parts is not NotImplemented:
                return parts
        result = func(*args, **kwargs or {})
        if known is not None:
            count = known(*args, **kwargs or {}, out_val=result) // 2
            self.total += count
            self.pairwise += count if func._overloadpacket in BATCHED or "attention" in func.name() else 0
        return result
