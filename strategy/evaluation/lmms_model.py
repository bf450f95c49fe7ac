"""What each lmms-eval model here does around its answers, alone or in several processes.

It speaks lmms-eval's language, and needs it once the answers are there.
"""

import atexit
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import nn

from strategy.attach import attach
from strategy.config import VTRConfig
from strategy.distributed import collectives, processes, tensor_parallel, zero
from strategy.evaluation.requests import answer_own, pool_requests
from strategy.evaluation.resume import Journal

# How answers are made, but not which.
PLACES = ("batch_size", "device", "device_map", "tensor_parallel", "zero_stage", "resume_folder", "engine")


class Evaluated:
    """Stands before a class of lmms-eval's among the bases of a model.

    model_id: its name there, which begins what it tells.
    """

    model_id: str
    rank: int

    def take_up(self, config: VTRConfig, arguments: Mapping[str, Any], shares: int) -> None:
        """Take up the answers in `resume_folder`, if that is among a model's arguments; see `Journal`."""
        folder = arguments.get("resume_folder")
        if folder is not None and not str(folder).strip():
            raise ValueError("resume_folder= is empty: name a folder, or leave it away")
        told = {"model": self.model_id, **arguments, **asdict(config)}
        settings = {name: value for name, value in told.items() if name not in PLACES}
        # The first of those that answer together writes.
        self.journal = Journal(Path(folder), settings, processes.rank() % shares == 0) if folder else None
        self.before = 0

    def share_out(self, model: nn.Module, decoder: Any, config: VTRConfig, shares: int, sharded: bool) -> None:
        """Split or shard the model's decoder, if so asked, and attach a configuration; errors are those of both."""
        # lmms-eval leaves its group of processes as it is, and one that ends so is now and then aborted.
        atexit.register(collectives.shutdown_process_groups)
        self.group = tensor_parallel.split(model, decoder, shares)
        self.shards = zero.shard(model, decoder) if sharded else None
        self.record = attach(model, config)
        self.seconds = 0.0

    def answered(self, requests: Sequence[Any], answer: Callable[[list[Any]], list[Any]], nothing: Any) -> list[Any]:
        """Answer lmms-eval's requests, in step with the other processes; see `answer_own`."""

        def in_lockstep(own: list[Any]) -> list[Any]:
            with zero.lockstep(self.shards):
                if self.journal is None:
                    return answer(own)
                answers, before = self.journal.fill_up(own, answer, nothing)
            self.before += before
            return answers

        start = time.perf_counter()
        if self.group or self.shards:
            # One that lmms-eval does not call, as all its answers are in a cache, is named here.
            collectives.gather(None)
        try:
            requests, own = pool_requests(requests, self.group)
            answers = answer_own(requests, in_lockstep, nothing)[own]
        except ValueError as error:
            raise SystemExit(f"{self.model_id}: {error}") from None
        self.seconds += time.perf_counter() - start
        return answers

    def clean(self) -> None:
        """Log what the answers of all processes cost, and let go of the model; lmms-eval calls it once, after them."""
        from lmms_eval.models.model_utils.gen_metrics import log_metrics, reset_logged_metrics  # noqa: PLC0415
        from loguru import logger  # noqa: PLC0415

        counts = collectives.is_first_rank(self.group)
        record, before = self.record.reduce_over_ranks(counts), sum(collectives.gather(self.before * counts))
        seconds = max(collectives.gather(self.seconds))
        tokens = record.decoded + record.prompts
        if self.rank == 0:
            logger.info(f"{self.model_id} {record.summary()}")
            if before:
                logger.info(f"{self.model_id}: {before} more questions were answered by an earlier run")
            # Some of lmms-eval's wrappers log what this process alone did.
            reset_logged_metrics()
            log_metrics(seconds, tokens, tokens / max(seconds, 1e-9), record.scalar_means())
        super().clean()  # type: ignore[misc]
