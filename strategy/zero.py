"""ZeRO stage 3: a decoder whose weights are sharded over all processes, each of which answers its own questions.

DeepSpeed gathers a layer's weights before the layer runs and frees them behind it. All processes take part in that, so
a forward pass of one is a pass of all; what each computes in it is its own affair.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch import distributed as dist

from strategy import parallel, ranks

STAGES = {"0": False, "3": True}


def read_stage(given: Any, shares: int) -> bool:
    """Whether `zero_stage` asks for sharded weights; ValueError for any other stage, or what does not go with it.

    shares: what `tensor_parallel` asks for.
    """
    if str(given) not in STAGES:
        raise ValueError(f"zero_stage={given!r}: allowed are 0, off, and 3, which shards the decoder's weights")
    wanted = STAGES[str(given)]
    if wanted and shares > 1:
        raise ValueError(f"zero_stage=3 and tensor_parallel={shares}: give one of the two")
    if wanted and ranks.count() == 1:
        raise ValueError(
            "zero_stage=3: want several processes started together, not 1: "
            "`accelerate launch --num_processes 2 -m lmms_eval`"
        )
    return wanted


class Shards:
    """The layers of a sharded decoder, through whose passes all processes go together.

    offload: DeepSpeed's, which gathers and frees.
    """

    def __init__(self, layers: nn.ModuleList, offload: Any) -> None:
        self.layers, self.steps = layers, offload.get_param_coordinator()
        self.device = next(layers.parameters()).device
        self.watch = ranks.Watch(range(ranks.count()))
        layers[0].register_forward_pre_hook(self._begin, prepend=True)

    def _begin(self, layer: nn.Module, args: tuple[Any, ...]) -> None:
        self._busy(True)  # which is not read, so that the host does not wait for the device
        self.steps.reset_step()

    def _busy(self, own: bool) -> Tensor:
        """How many processes have something to compute in the pass that begins, [1]."""
        self.watch.begin()
        busy = torch.full((1,), float(own), device=self.device)
        dist.all_reduce(busy)
        return busy

    def follow(self) -> None:
        """Gather along with the passes of others until no process has something to compute any more."""
        while self._busy(False).item():
            self.steps.reset_step()
            for layer in self.layers:
                self.steps.trace_prologue(layer)
                if self.steps.is_record_trace():
                    self.steps.record_module(layer)
                self.steps.fetch_sub_module(layer, forward=True)
                self.steps.release_sub_module(layer, forward=True)


def shard(model: nn.Module, decoder: Any) -> Shards:
    """Leave of the weights of a model's decoder one process's share, and move the model to its device.

    decoder: inside of the model or the model itself, whose weights lie on the CPU. Called by all processes that were
    started, with the same model, whose forward calls then belong into `in_step`. Raises ValueError without deepspeed.
    """
    deepspeed = parallel.started("zero_stage=3")
    from deepspeed.runtime.zero.parameter_offload import DeepSpeedZeRoOffload  # noqa: PLC0415  see `started`

    for layer in decoder.layers:
        # Gathered whole, so that hooks behind a layer find all of its weights.
        deepspeed.utils.set_z3_leaf_module(layer, True)
    size = sum(parameter.numel() for parameter in decoder.layers[0].parameters())
    # Not `deepspeed.initialize`, which moves all weights to the device before it shards them.
    offload = DeepSpeedZeRoOffload(
        decoder.layers,
        timers=None,
        ds_config={
            "train_micro_batch_size_per_gpu": 1,
            "zero_optimization": {"stage": 3, "memory_efficient_linear": False},
        },
        prefetch_bucket_size=size,
        max_live_parameters=2 * size,
        param_persistence_threshold=0,
    )
    for hook in offload.backward_hooks:
        hook.remove()
    model.to(ranks.take_device())
    return Shards(decoder.layers, offload)


@contextmanager
def in_step(shards: Shards | None) -> Iterator[None]:
    """Keep forward calls inside of this `with` in step with those of the other processes, and end when all are through.

    Each process enters it as often as the others, and calls the model inside as often as it likes, or never. An error
    is the end of all. Without shards it does nothing.
    """
    if shards is None:
        yield
        return
    with ranks.ending_all():
        yield
    shards.follow()
