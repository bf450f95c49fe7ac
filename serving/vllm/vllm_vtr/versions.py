"""Which versions of vLLM the plug-in is written for, and what differs between them."""

import inspect
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import wraps
from typing import Any

from torch import nn
from vllm import __version__, ir
from vllm.logger import init_logger
from vllm.model_executor.custom_op import CustomOp
from vllm.utils.math_utils import cdiv

TESTED = ("0.26", "0.32")

logger = init_logger("vllm.vtr")


def wanted() -> dict[Callable[..., Any], tuple[tuple[str, ...], ...]]:
    """Return the functions of vLLM that the plug-in calls or overrides, with their parameters in tested versions."""
    from vllm.v1.core.sched.scheduler import Scheduler
    from vllm.v1.core.single_type_kv_cache_manager import FullAttentionManager
    from vllm.v1.metrics.loggers import StatLoggerManager
    from vllm.v1.worker.gpu.block_table import BlockTables
    from vllm.v1.worker.gpu.kv_connector import KVConnector
    from vllm.v1.worker.gpu.model_runner import GPUModelRunner
    from vllm.v1.worker.gpu.model_states.default import DefaultModelState

    attention = ("input_batch", "cudagraph_mode", "block_tables", "slot_mappings", "attn_groups", "kv_cache_config")
    blocks = ("request_id", "num_tokens")
    schedule = ("request", "num_computed_tokens", "num_new_tokens", "encoder_compute_budget", "shift_computed_tokens")
    needed = ("new_computed_blocks", "total_computed_tokens", "num_local_computed_tokens", "num_tokens_main_model")
    allocate = (*blocks, *needed, "apply_admission_cap")
    slots = ("idx_mapping", "query_start_loc", "positions", "num_tokens_padded", "out")
    stats = ("spec_decoding_stats", "kv_connector_stats", "cudagraph_stats", "perf_stats")
    attend = (*attention, "for_capture")
    return {
        Scheduler._update_after_schedule: (("scheduler_output",),),
        Scheduler._try_schedule_encoder_inputs: (schedule,),
        Scheduler.make_stats: (stats, (*stats, "ec_connector_stats")),
        FullAttentionManager.get_num_blocks_to_allocate: (allocate, (*allocate, "prefill_end")),
        FullAttentionManager.allocate_new_blocks: ((*blocks, "num_tokens_main_model"),),
        FullAttentionManager.pop_blocks_for_free: (("request_id",),),
        BlockTables.compute_slot_mappings: (slots,),
        GPUModelRunner.initialize_kv_cache: (
            ("kv_cache_config",),
            ("kv_cache_config", "is_profiling", "kv_cache_allocation_context"),
        ),
        KVConnector.post_forward: (("finished_req_ids", "wait_for_save"), ("finished_req_ids",)),
        StatLoggerManager.record: (("scheduler_stats", "iteration_stats", "mm_cache_stats", "engine_idx"),),
        DefaultModelState.add_request: (("req_index", "new_req_data"),),
        DefaultModelState.preprocess_state: (
            ("input_batch", "block_tables", "kv_cache_config", "num_computed_tokens"),
        ),
        DefaultModelState.prepare_attn: (attend, (*attend, "ubatch_idx", "model_specific_attn_metadata")),
    }


def check() -> None:
    """Check that vLLM is what the plug-in is written for.

    Raises:
        ValueError: A function of vLLM has other parameters than in the tested versions.
    """
    if not __version__.startswith(TESTED):
        logger.warning("vtr is tested with vLLM %s; this is %s.", " and ".join(TESTED), __version__)
    for function, expected in wanted().items():
        found = tuple(inspect.signature(function).parameters)[1:]
        if found not in expected:
            raise ValueError(
                f"vtr: {function.__qualname__} of vLLM {__version__} takes {found}, where "
                f"{' or '.join(map(str, expected))} were expected: "
                f"install vLLM {' or '.join(TESTED)}, or a vllm-vtr for this version"
            )


def wrap_once(owner: type, name: str, wrap: Callable[[Callable[..., Any]], Callable[..., Any]]) -> None:
    """Replace a method of vLLM's by what `wrap` makes of it, unless that has happened in this process before."""
    stock = getattr(owner, name)
    if not hasattr(stock, "vtr"):
        new = wraps(stock)(wrap(stock))
        new.vtr = True  # type: ignore[attr-defined]
        setattr(owner, name, new)


def extend_runner() -> None:
    """Let the runner report the seconds of a model state that prunes; in 0.26 also give it the block tables."""
    from vllm.v1.worker.gpu.model_runner import GPUModelRunner

    def extended(stock: Callable[..., None]) -> Callable[..., None]:
        def initialize_kv_cache(self: Any, *args: Any, **kwargs: Any) -> None:
            stock(self, *args, **kwargs)
            if hasattr(self.model_state, "scoring_seconds"):
                self.kv_connector = self.model_state.scoring_seconds
                if __version__.startswith("0.26"):
                    self.model_state.initialize_kv_cache(self.kv_cache_config, self.block_tables)

        return initialize_kv_cache

    wrap_once(GPUModelRunner, "initialize_kv_cache", extended)


def blocks_for(tables: Any, group: int, tokens: int) -> int:
    """Return how many blocks in the table of a cache group hold so many tokens of a request."""
    count = cdiv(tokens, tables.block_sizes[group])
    # Before 0.32, a table may count smaller blocks than the scheduler does.
    return count * tables.blocks_per_kv_block[group] if __version__.startswith("0.26") else count


def uncompiled_methods(decoder: nn.Module) -> dict[CustomOp, Callable[..., Any]]:
    """Return the methods by which a decoder's operations run outside of compiled programs, as one kernel each.

    Inductor fuses what their native methods are made of. A prompt that is pruned runs without Inductor.
    """
    found = {}
    for module in decoder.modules():
        if isinstance(module, CustomOp):
            given, module._enforce_enable = module._enforce_enable, True
            found[module] = module.dispatch_forward(compile_native=False)
            module._enforce_enable = given
    return found


@contextmanager
def uncompiled(methods: dict[CustomOp, Callable[..., Any]]) -> Iterator[None]:
    """Run operations by these methods, and norms by vLLM's own kernel, where the platform has one."""
    given = {module: module._forward_method for module in methods}
    with ExitStack() as stack:
        for op in (ir.ops.rms_norm, ir.ops.fused_add_rms_norm):
            stack.enter_context(op.set_priority([name for name in ("vllm_c", "native") if name in op.impls]))
        try:
            for module, method in methods.items():
                module._forward_method = method
            yield
        finally:
            for module, method in given.items():
                module._forward_method = method
