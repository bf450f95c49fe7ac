"""The engine's side: prompts are scheduled whole, and the blocks of what was pruned go back to the pool."""

from collections import Counter
from typing import Any

from vllm.utils.math_utils import cdiv
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.core.single_type_kv_cache_manager import FullAttentionManager
from vllm.v1.metrics.stats import SchedulerStats
from vllm.v1.request import Request

from vllm_vtr.configuration import pruning_of
from vllm_vtr.families import num_visual_tokens
from vllm_vtr.metrics import AFTER, BEFORE, REQUESTS


class PrunedBlocks(FullAttentionManager):
    """Counts the blocks of a pruned request by the tokens that its cache holds.

    Attributes:
        evicted: By request, how many tokens of its prompt the cache does not hold any more.
    """

    evicted: dict[str, int]

    def evict(self, request_id: str, prompt: int, evicted: int) -> None:
        """Free the blocks that a request no longer needs once its prompt, of so many tokens, is pruned."""
        self.evicted[request_id] = evicted
        blocks, keep = self.req_to_blocks[request_id], cdiv(prompt - evicted, self.block_size)
        # The worker still writes all of the prompt there, before any step that the blocks are given to later.
        self.block_pool.free_blocks(reversed(blocks[keep:]))
        del blocks[keep:]

    def get_num_blocks_to_allocate(self, request_id: str, num_tokens: int, *args: Any, **kwargs: Any) -> int:
        held = num_tokens - self.evicted.get(request_id, 0)
        return super().get_num_blocks_to_allocate(request_id, held, *args, **kwargs)

    def allocate_new_blocks(self, request_id: str, num_tokens: int, num_tokens_main_model: int) -> list[Any]:
        held = num_tokens - self.evicted.get(request_id, 0)
        return super().allocate_new_blocks(request_id, held, num_tokens_main_model)

    def pop_blocks_for_free(self, request_id: str) -> list[Any]:
        self.evicted.pop(request_id, None)
        return super().pop_blocks_for_free(request_id)


class PruningScheduler(Scheduler):
    """A scheduler for prompts that are pruned: see the module."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.pruning = pruning_of(self.vllm_config)
        self.counts: Counter[str] = Counter()
        self.block_managers: list[PrunedBlocks] = []
        for manager in self.kv_cache_manager.coordinator.single_type_managers:
            if type(manager) is not FullAttentionManager:
                raise ValueError(f"vtr: the cache of this model needs a {type(manager).__name__}, which cannot prune")
            # The coordinator makes its managers itself; each has become one that also knows what is evicted.
            manager.__class__ = PrunedBlocks
            manager.evicted = {}
            self.block_managers.append(manager)

    def _evicted(self, request: Request) -> int:
        """Return how many tokens of a request's prompt will be pruned."""
        return self.pruning.evicted(request.num_prompt_tokens, request.mm_features, request.sampling_params)

    def _try_schedule_encoder_inputs(
        self,
        request: Request,
        num_computed_tokens: int,
        num_new_tokens: int,
        encoder_compute_budget: int,
        shift_computed_tokens: int = 0,
    ) -> tuple[Any, ...]:
        whole = num_computed_tokens == 0 and self._evicted(request) > 0
        if whole:
            # What was answered before a preemption follows in a step of its own, since it sees what is left.
            num_new_tokens = min(num_new_tokens, request.num_prompt_tokens)
        found = super()._try_schedule_encoder_inputs(
            request, num_computed_tokens, num_new_tokens, encoder_compute_budget, shift_computed_tokens
        )
        if whole and found[1] < request.num_prompt_tokens:
            return [], 0, encoder_compute_budget, *([] for _ in found[3:])
        return found

    def _update_after_schedule(self, scheduler_output: SchedulerOutput) -> None:
        super()._update_after_schedule(scheduler_output)
        for request_id, scheduled in scheduler_output.num_scheduled_tokens.items():
            request = self.requests[request_id]
            whole = request.num_computed_tokens == scheduled == request.num_prompt_tokens
            if whole and request.mm_features and (evicted := self._evicted(request)):
                for manager in self.block_managers:
                    manager.evict(request_id, request.num_prompt_tokens, evicted)
                visual = num_visual_tokens(request.mm_features)
                self.counts.update({REQUESTS: 1, BEFORE: visual, AFTER: visual - evicted})

    def make_stats(
        self, spec_decoding_stats: Any = None, kv_connector_stats: Any = None, *args: Any, **kwargs: Any
    ) -> SchedulerStats | None:
        stats = super().make_stats(spec_decoding_stats, None, *args, **kwargs)
        counts = dict(self.counts) | (kv_connector_stats.data if kv_connector_stats else {})
        self.counts.clear()
        if stats is not None and counts:
            # See `metrics`.
            stats.kv_connector_stats = counts
        return stats


class AsyncPruningScheduler(PruningScheduler, AsyncScheduler):
    """The same, for steps that are scheduled before the last one has ended."""


def create(vllm_config: Any, **kwargs: Any) -> PruningScheduler:
    """Create the scheduler that a configuration needs."""
    kind = AsyncPruningScheduler if vllm_config.scheduler_config.async_scheduling else PruningScheduler
    return kind(vllm_config=vllm_config, **kwargs)
