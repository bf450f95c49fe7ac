"""ZeRO stage 3: a decoder whose weights are sharded over all processes, each of which answers its own questions.

DeepSpeed gathers a layer's weights before the layer runs and frees them afterwards. All processes take part in that, so
every forward pass is collective, but each rank processes its own input.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch import distributed as dist

from strategy.distributed import processes, watchdog
from strategy.distributed.tensor_parallel import init_deepspeed

STAGES = {"0": False, "3": True}


def parse_zero_stage(given: Any, tp_size: int) -> bool:
    """Return whether `zero_stage` asks for sharded weights.

    Args:
        given: The argument, 0 or 3.
        tp_size: What `tensor_parallel` asks for.

    Raises:
        ValueError: Another stage is given, or one that does not fit the other arguments.
    """
    if str(given) not in STAGES:
        raise ValueError(f"zero_stage={given!r}: allowed are 0, off, and 3, which shards the decoder's weights")
    sharded = STAGES[str(given)]
    if sharded and tp_size > 1:
        raise ValueError(f"zero_stage=3 and tensor_parallel={tp_size}: give one of the two")
    if sharded and processes.world_size() == 1:
        raise ValueError(
            "zero_stage=3: want several processes started together, not 1: "
            "`accelerate launch --num_processes 2 -m lmms_eval`"
        )
    return sharded


class ZeroShards:
    """The layers of a sharded decoder, whose forward passes all processes run together.

    Args:
        layers: The decoder's layers.
        offload: DeepSpeed's object that gathers and frees their weights.

    Attributes:
        in_pass: Whether a forward pass has begun and not reached the end of the last layer.
    """

    def __init__(self, layers: nn.ModuleList, offload: Any) -> None:
        self.layers, self.coordinator = layers, offload.get_param_coordinator()
        self.device = next(layers.parameters()).device
        self.watchdog = watchdog.HangWatchdog(range(processes.world_size()))
        self.in_pass = False
        layers[0].register_forward_pre_hook(self._begin_pass, prepend=True)
        layers[-1].register_forward_hook(self._end_pass)

    def _begin_pass(self, layer: nn.Module, args: tuple[Any, ...]) -> None:
        self.in_pass = True
        self._any_rank_busy(True)  # the result is not read, so that the host does not wait for the device
        self.coordinator.reset_step()

    def _end_pass(self, layer: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        self.in_pass = False

    def _any_rank_busy(self, own: bool) -> Tensor:
        """Return how many ranks have something to compute in the pass that begins, [1]."""
        self.watchdog.begin()
        busy = torch.full((1,), float(own), device=self.device)
        dist.all_reduce(busy)
        return busy

    def join_remaining_passes(self) -> None:
        """Take part in the gathering of other ranks' passes until no rank has anything left to compute."""
        while self._any_rank_busy(False).item():
            self.coordinator.reset_step()
            for layer in self.layers:
                self.coordinator.trace_prologue(layer)
                if self.coordinator.is_record_trace():
                    self.coordinator.record_module(layer)
                self.coordinator.fetch_sub_module(layer, forward=True)
                self.coordinator.release_sub_module(layer, forward=True)


def shard(model: nn.Module, decoder: Any) -> ZeroShards:
    """Keep one process's share of the decoder's weights, and move the model to the process's device.

    All processes that were started call it with the same model. Forward calls of the model then belong into `lockstep`.

    Args:
        model: A model whose weights lie on the CPU.
        decoder: The decoder inside the model, or the model itself.

    Raises:
        ValueError: deepspeed is not installed.
    """
    deepspeed = init_deepspeed("zero_stage=3")
    from deepspeed.runtime.zero.parameter_offload import DeepSpeedZeRoOffload  # noqa: PLC0415  see `init_deepspeed`

    for layer in decoder.layers:
        # DeepSpeed then gathers the layer as a whole, so that hooks behind the layer find all of its weights.
        deepspeed.utils.set_z3_leaf_module(layer, True)
    size = sum(parameter.numel() for parameter in decoder.layers[0].parameters())
    # `deepspeed.initialize` would move all weights to the device before it shards them.
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
    model.to(processes.take_device())
    return ZeroShards(decoder.layers, offload)


@contextmanager
def lockstep(shards: ZeroShards | None) -> Iterator[None]:
    """Keep the forward calls inside this `with` in step with those of the other processes, until all have finished.

    Each process enters it as often as the others, and calls the model inside as often as it likes, or never. An error
    ends all processes. Without shards the context does nothing.
    """
    if shards is None:
        yield
        return
    with watchdog.abort_all_on_error():
        yield
    shards.join_remaining_passes()
