"""CUDA graphs of the modules that make visual tokens."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_map_only, tree_unflatten

from strategy.distributed.collectives import broadcast_first
from strategy.graph.cuda_graphs import ProgramKey
from strategy.graph.decoder import FusedDecoder, plain_tensors
from strategy.graph.fallback import FallbackPolicy
from strategy.kernels.packed_attention import keeping_bounds
from strategy.kernels.transfers import host_copy
from strategy.metrics.meter import CostMeter
from strategy.pruning.encoder import EncoderRecorder

FLASH_REASON = "their flash attention reads on the GPU where pictures begin, which programs have on the host"


def attends_by_flash(module: nn.Module) -> bool:
    """Return whether a vision module attends by a library's flash attention, see `FLASH_REASON`."""
    return "flash" in str(getattr(getattr(module, "config", None), "_attn_implementation", ""))


class VisionGraphs:
    """Runs vision modules as programs of the graph engine, on a GPU.

    Args:
        decoder: Holds the graphs, and the lock.
        policy: Says what is compiled.
        meter: Counts the operations of vision modules one by one, the first time.
        size_methods: See `Backbone.size_methods`.
        encoder: Records what a tower sees, for strategies that want it.
    """

    def __init__(
        self,
        decoder: FusedDecoder,
        policy: FallbackPolicy,
        meter: CostMeter,
        size_methods: Sequence[str],
        encoder: EncoderRecorder | None,
    ) -> None:
        self.decoder, self.policy, self.meter, self.size_methods = decoder, policy, meter, size_methods
        self.encoder = encoder

    def usable(self, module: nn.Module) -> bool:
        """Return whether graphs may run a module."""
        on_gpu = next(module.parameters()).device.type == "cuda"
        return on_gpu and not self.policy.unusable and not torch.is_grad_enabled()

    def forward(self, module: nn.Module, stock: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Return what a module's stock forward call returns."""
        device = next(module.parameters()).device
        leaves, spec = tree_flatten((args, kwargs))
        floats = [at for at, leaf in enumerate(leaves) if torch.is_tensor(leaf) and leaf.is_floating_point()]
        inputs = [leaves[at].to(device, non_blocking=True) for at in floats]
        # Integers, such as the sizes of pictures, decide about shapes; on the CPU they can be read during a capture.
        # A program holds none of the pixels that it was captured with.
        leaves = [
            None if at in floats else host_copy(leaf) if torch.is_tensor(leaf) else leaf
            for at, leaf in enumerate(leaves)
        ]
        others = [
            leaf.tolist() if torch.is_tensor(leaf) else leaf for at, leaf in enumerate(leaves) if at not in floats
        ]
        known: dict[str, Any] = {}

        def program(*pixels: Tensor) -> Any:
            filled = [pixels[floats.index(at)] if at in floats else leaf for at, leaf in enumerate(leaves)]
            own_args, own_kwargs = tree_unflatten(filled, spec)
            call = partial(stock, *own_args, **own_kwargs)
            with _caching(module, self.size_methods, known), keeping_bounds(known):
                return (call(), ()) if self.encoder is None else self.encoder.record_apart(call)

        shapes = [(pixels.shape, pixels.dtype) for pixels in inputs]
        label = f"{type(module).__name__} of {', '.join(str(list(shape)) for shape, _ in shapes)}"
        key = ProgramKey("vision", (id(module), str(others), *shapes), label)
        graphs, wanted = self.decoder.graphs, not self.meter.counts_vision
        with plain_tensors(), self.policy.compiling("vision", graphs.device, wanted):
            output, seen = graphs.run(key, program, inputs, warmup=True)
            if self.encoder is not None:
                self.encoder.add(seen)
            return tree_map_only(Tensor, partial(broadcast_first, group=graphs.group), output)


@contextmanager
def _caching(module: nn.Module, names: Sequence[str], known: dict[str, Any]) -> Iterator[None]:
    """Let methods of a module return what they returned before, since they ask the host."""

    def once(name: str, *args: Any) -> Any:
        if name not in known:
            known[name] = getattr(type(module), name)(module, *args)
        return known[name]

    for name in names:
        setattr(module, name, partial(once, name))
    try:
        yield
    finally:
        for name in names:
            delattr(module, name)
