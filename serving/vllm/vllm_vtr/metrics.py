"""Counters of what was pruned, in vLLM's own metrics.

The scheduler counts prompts and tokens, a worker the seconds. Both reach the process that answers clients in the field
that vLLM has for statistics of KV connectors, which do not go with pruning, so that it is free.
"""

from collections.abc import Callable, Sequence
from typing import Any

from prometheus_client import Counter
from vllm.config import VllmConfig
from vllm.distributed.kv_transfer.kv_connector.v1.metrics import KVConnectorStats
from vllm.v1.metrics.loggers import AggregateStatLoggerBase, StatLoggerManager
from vllm.v1.outputs import KVConnectorOutput
from vllm.v1.worker.gpu.kv_connector import KVConnector

from strategy.metrics.timing import Clock
from vllm_vtr import versions
from vllm_vtr.configuration import asked

REQUESTS, BEFORE, AFTER, SECONDS = "requests", "visual_tokens_before", "visual_tokens_after", "scoring_seconds"
COUNTERS = {
    REQUESTS: "Prompts that were pruned; after a preemption they are pruned again.",
    BEFORE: "Visual tokens of the prompts that were pruned, before.",
    AFTER: "Visual tokens of these prompts that their caches hold.",
    SECONDS: "Seconds in which visual tokens were scored, selected and gathered.",
}


class ScoringSeconds(KVConnector):
    """Adds to each step's output the seconds of scoring that have been measured since the last one.

    Args:
        clock: Returns the clock that measures them.
    """

    def __init__(self, clock: Callable[[], Clock]) -> None:
        self.clock = clock

    def post_forward(self, finished_req_ids: set[str], wait_for_save: bool = True) -> KVConnectorOutput | None:
        seconds = self.clock().take("scoring")
        return KVConnectorOutput(kv_connector_stats=KVConnectorStats({SECONDS: seconds})) if seconds else None


class PruningCounters(AggregateStatLoggerBase):
    """The counters, named as vLLM names its own; they come first of its loggers, which know no such statistics.

    Args:
        vllm_config: The configuration of the engines.
        engine_indexes: Their numbers.
    """

    def __init__(self, vllm_config: VllmConfig, engine_indexes: Sequence[int]) -> None:
        model = vllm_config.model_config.served_model_name
        counters = {
            name: Counter(f"vllm:vtr_{name}", text, ["model_name", "engine"]) for name, text in COUNTERS.items()
        }
        self.counters = {
            index: {name: counter.labels(model, str(index)) for name, counter in counters.items()}
            for index in engine_indexes
        }

    def record(
        self, scheduler_stats: Any, iteration_stats: Any, mm_cache_stats: Any = None, engine_idx: int = 0
    ) -> None:
        if scheduler_stats is None or scheduler_stats.kv_connector_stats is None:
            return
        counted, scheduler_stats.kv_connector_stats = scheduler_stats.kv_connector_stats, None
        for name, value in counted.items():
            self.counters[engine_idx][name].inc(value)

    def log_engine_initialized(self) -> None:
        """Log nothing; `configuration` has logged what is pruned."""


def install() -> None:
    """Let vLLM count what is pruned, in processes whose engines are asked to prune."""

    def counting(stock: Callable[..., None]) -> Callable[..., None]:
        def init(self: Any, vllm_config: VllmConfig, *args: Any, **kwargs: Any) -> None:
            stock(self, vllm_config, *args, **kwargs)
            if asked(vllm_config) is not None:
                # The stock loggers have removed the counters of an earlier engine of this process.
                self.stat_loggers.insert(0, PruningCounters(vllm_config, self.engine_indexes))

        return init

    versions.wrap_once(StatLoggerManager, "__init__", counting)
