"""What each lmms-eval model here does around its answers, alone or in several processes.

It speaks lmms-eval's language, and needs it once the answers are there.
"""

import time
from collections.abc import Callable, Sequence
from typing import Any

from torch import nn

from strategy import parallel, ranks, zero
from strategy.config import VTRConfig
from strategy.engine import attach


class Evaluated:
    """Stands before a class of lmms-eval's among the bases of a model.

    model_id: its name there, which begins what it tells.
    """

    model_id: str
    rank: int

    def share_out(self, model: nn.Module, decoder: Any, config: VTRConfig, shares: int, sharded: bool) -> None:
        """Split or shard the model's decoder, if so asked, and attach a configuration; errors are those of both."""
        self.group = parallel.split(model, decoder, shares)
        self.shards = zero.shard(model, decoder) if sharded else None
        self.record = attach(model, config)
        self.seconds = 0.0

    def answered(self, requests: Sequence[Any], answer: Callable[[list[Any]], list[Any]], nothing: Any) -> list[Any]:
        """Answer lmms-eval's requests, in step with the other processes; see `ranks.answer_own`."""

        def in_step(own: list[Any]) -> list[Any]:
            with zero.in_step(self.shards):
                return answer(own)

        start = time.perf_counter()
        try:
            requests, own = parallel.pooled(requests, self.group)
            answers = ranks.answer_own(requests, in_step, nothing)[own]
        except ValueError as error:
            raise SystemExit(f"{self.model_id}: {error}") from None
        self.seconds += time.perf_counter() - start
        return answers

    def clean(self) -> None:
        """Log what the answers of all processes cost, and let go of the model; lmms-eval calls it once, after them."""
        from lmms_eval.models.model_utils.gen_metrics import log_metrics, reset_logged_metrics  # noqa: PLC0415
        from loguru import logger  # noqa: PLC0415

        record = self.record.over_ranks(parallel.is_first(self.group))
        seconds = max(ranks.gather(self.seconds))
        tokens = record.decoded + record.prompts
        if self.rank == 0:
            logger.info(f"{self.model_id} {record.summary()}")
            # Some of lmms-eval's wrappers log what this process alone did.
            reset_logged_metrics()
            log_metrics(seconds, tokens, tokens / max(seconds, 1e-9), record.numbers())
        super().clean()  # type: ignore[misc]
