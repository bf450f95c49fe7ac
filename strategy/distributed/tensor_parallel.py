"""Tensor parallelism: a decoder whose heads are split over several processes, which answer together.

DeepSpeed splits the layers and sums their outputs.
"""

import atexit
from types import SimpleNamespace
from typing import Any

from torch import distributed as dist
from torch import nn
from torch.distributed import ProcessGroup

from strategy.backbone import find_backbone
from strategy.distributed import collectives, processes
from strategy.distributed.watchdog import HangWatchdog
from strategy.kernels.layer_check import try_layers
from strategy.kernels.layer_facts import tp_group_of
from strategy.kernels.llama_layer import fusion_blocker


def parse_tp_size(given: Any) -> int:
    """Return how many processes `tensor_parallel` asks for.

    Raises:
        ValueError: The value is not a number of processes, or does not divide the number of those started.
    """
    if not str(given).isdecimal() or int(given) < 1:
        raise ValueError(f"tensor_parallel={given!r}: allowed is a whole number from 1 up")
    tp_size = int(given)
    if processes.world_size() % tp_size:
        raise ValueError(
            f"tensor_parallel={tp_size}: want {tp_size} processes started together or a multiple of it, not "
            f"{processes.world_size()}: `accelerate launch --num_processes {tp_size} -m lmms_eval`"
        )
    return tp_size


def split(model: nn.Module, decoder: Any, tp_size: int) -> ProcessGroup | None:
    """Keep one rank's share of each decoder layer, and move the model to the rank's device.

    All processes that were started call it with the same model. Each `tp_size` of them, in order, become a group that
    holds the model once.

    Args:
        model: A model of a known backbone, whose weights lie on the CPU.
        decoder: The decoder inside the model, or the model itself.
        tp_size: Ranks of a group. With one rank nothing is done.

    Returns:
        The group of this rank; None with one rank.

    Raises:
        ValueError: The heads, the layers or the processes cannot be split so, the decoder is split already, or
            deepspeed is not installed.
    """
    if tp_size == 1:
        return None
    heads, keys = decoder.config.num_attention_heads, decoder.config.num_key_value_heads
    if heads % tp_size or keys % tp_size:
        fit = [n for n in range(1, keys + 1) if not (heads % n or keys % n)]
        here = [str(n) for n in fit if processes.world_size() % n == 0]
        raise ValueError(
            f"tensor_parallel={tp_size}: {heads} attention heads and {keys} key heads can be split over "
            f"{', '.join(map(str, fit))} processes, and of these {', '.join(here)} fit the "
            f"{processes.world_size()} started"
        )
    backbone = find_backbone(model, None)
    specs = backbone.layer_specs(decoder)
    if reason := fusion_blocker(decoder.layers, specs) or try_layers(decoder, specs, backbone, fused=True).blocker:
        raise ValueError(
            f"tensor_parallel={tp_size}: {reason} cannot be split; device_map=auto lays whole layers on several GPUs"
        )
    if tp_group_of(decoder.layers) is not None:
        raise ValueError(f"tensor_parallel={tp_size}: this {type(model).__name__} is split already")
    deepspeed = init_deepspeed(f"tensor_parallel={tp_size}")
    group, _ = dist.new_subgroups(tp_size, timeout=collectives.group_timeout())
    # DeepSpeed casts all to the type of the weights, also the rotary tables, whose precision is higher.
    fine = {name: buffer.clone() for name, buffer in decoder.named_buffers()}
    # The outputs of these projections are sums over all ranks; all other projections give a rank its own share.
    summed = {(spec.output, spec.down) for spec in specs}
    deepspeed.init_inference(
        decoder,
        dtype=decoder.dtype,
        replace_with_kernel_inject=False,
        injection_policy={type(decoder.layers[0]): next(iter(summed))},
        tensor_parallel={
            "tp_size": tp_size,
            "tp_group": group,
            "mpu": SimpleNamespace(get_model_parallel_group=lambda: group),
        },
    )
    for name, buffer in decoder.named_buffers():
        buffer.data = fine[name].to(buffer.device)
    model.to(processes.take_device())
    decoder.register_forward_pre_hook(HangWatchdog(dist.get_process_group_ranks(group)).begin)
    return group


def init_deepspeed(argument: str) -> Any:
    """Connect all processes, take this rank's GPU, and return the module deepspeed.

    Raises:
        ValueError: deepspeed is not installed; the message begins with `argument`, which asked for it.
    """
    try:
        import deepspeed  # noqa: PLC0415  an extra, and its import takes seconds
    except ImportError:
        raise ValueError(f"{argument} needs deepspeed: install the extra `scale`") from None
    processes.take_device()
    # DeepSpeed's own all-reduce for CPUs is over all processes, whatever the group, and is compiled at its first use.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(timeout=collectives.group_timeout())
    # torch aborts now and then a process that ends while a group's threads run.
    atexit.register(collectives.shutdown_process_groups)
    return deepspeed
