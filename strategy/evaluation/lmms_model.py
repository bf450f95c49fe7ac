"""The mixin of every lmms-eval model of this repository, for one process or several.

The module imports lmms-eval only once the answers are there.
"""

import atexit
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from strategy.attach import attach
from strategy.config import VTRConfig
from strategy.distributed import collectives, processes, tensor_parallel, zero
from strategy.evaluation.requests import answer_own, pool_requests
from strategy.evaluation.resume import AnswerJournal
from strategy.options import unquoted

# Settings that cannot change answers, and are ignored on resume.
IGNORED_ON_RESUME = ("batch_size", "device", "device_map", "tensor_parallel", "zero_stage", "resume_folder", "engine")


class PrunedModelMixin:
    """A mixin: list it before the lmms-eval class among the bases of a model.

    Attributes:
        model_id: The model's name in lmms-eval, with which its messages begin.
        rank: This process's number, as lmms-eval's classes set it.
        record: What was kept and what it cost.
        num_resumed: How many answers came from an earlier run.
    """

    model_id: str
    rank: int

    @classmethod
    def create_from_arg_string(cls, arg_string: str, additional_config: Mapping[str, Any] | None = None) -> Any:
        """Return the model that a command line describes; a value among `--model_args` may be quoted.

        Args:
            arg_string: What `--model_args` holds.
            additional_config: Other options of lmms-eval's command line, by the argument of the model that they set.

        Raises:
            SystemExit: The text is not a list of arguments, or one is given twice. lmms-eval would print a traceback
                and end with exit status 0.
        """
        from lmms_eval.utils import simple_parse_args_string  # noqa: PLC0415

        try:
            arguments = simple_parse_args_string(arg_string)
        except ValueError:
            raise SystemExit(
                f"{cls.model_id}: --model_args {arg_string}: want name=value,... with quotes around a value that has "
                "commas, quotes or brackets itself, as in --model_args 'pretrained=\"/data/a,b\"'"
            ) from None
        others = {name: value for name, value in (additional_config or {}).items() if value is not None}
        for name in arguments.keys() & others.keys():
            raise SystemExit(f"{cls.model_id}: {name} is among --model_args: give it as --{name} {arguments[name]}")
        return cls(**{name: unquoted(value) for name, value in arguments.items()}, **others)

    def open_journal(self, config: VTRConfig, arguments: Mapping[str, Any], tp_size: int) -> AnswerJournal | None:
        """Open the journal in the folder that the model argument `resume_folder` names; return None without one.

        Raises:
            ValueError: The name is empty, and as for `AnswerJournal`.
        """
        folder = arguments.get("resume_folder")
        if folder is None:
            return None
        if not str(folder).strip():
            raise ValueError("resume_folder= is empty: name a folder, or omit it")
        settings = {"model": self.model_id, **arguments, **config.values()}
        settings = {name: value for name, value in settings.items() if name not in IGNORED_ON_RESUME}
        # The first of the ranks that share a model writes.
        return AnswerJournal(Path(folder), settings, writes=processes.rank() % tp_size == 0)

    def distribute_and_attach(
        self,
        model: nn.Module,
        decoder: Any,
        config: VTRConfig,
        tp_size: int,
        sharded: bool,
        journal: AnswerJournal | None,
    ) -> None:
        """Prepare the model for its questions: split or shard its decoder over the ranks, and attach the configuration.

        Args:
            model: The model, loaded.
            decoder: Its text decoder.
            config: What to prune.
            tp_size: How many ranks share a model by tensor parallelism.
            sharded: Whether the ranks share the weights, as in ZeRO's stage 3.
            journal: Where answers are looked up and written, if anywhere; see `open_journal`.

        Raises:
            ValueError: As for `tensor_parallel.split`, `zero.shard` and `attach`.
        """
        # lmms-eval leaves its process group open, and a process that ends so is aborted now and then.
        atexit.register(collectives.shutdown_process_groups)
        self.tp_group = tensor_parallel.split(model, decoder, tp_size)
        self.shards = zero.shard(model, decoder) if sharded else None
        self.record = attach(model, config)
        self.journal = journal
        self.seconds = 0.0
        self.num_resumed = 0

    def answer_requests(
        self, requests: Sequence[Any], answer: Callable[[list[Any]], list[Any]], empty_answer: Any
    ) -> list[Any]:
        """Answer lmms-eval's requests together with the other ranks; see `answer_own`.

        Args:
            requests: The requests of this rank.
            answer: Answers a list of requests.
            empty_answer: What padding requests get, and what the journal does not keep.
        """

        def answer_in_lockstep(own: list[Any]) -> list[Any]:
            with zero.lockstep(self.shards):
                if self.journal is None:
                    return answer(own)
                answers, num_resumed = self.journal.answer_missing(own, answer, empty_answer)
            self.num_resumed += num_resumed
            return answers

        start = time.perf_counter()
        if self.tp_group or self.shards:
            # lmms-eval does not call a rank whose answers are all in its cache; here the others name that rank.
            collectives.gather(None)
        try:
            requests, own = pool_requests(requests, self.tp_group)
            answers = answer_own(requests, answer_in_lockstep, empty_answer)[own]
        except ValueError as error:
            raise SystemExit(f"{self.model_id}: {error}") from None
        self.seconds += time.perf_counter() - start
        return answers

    def clean(self) -> None:
        """Log what the answers of all ranks cost, and release the model; lmms-eval calls it once, after the answers."""
        from lmms_eval.models.model_utils.gen_metrics import log_metrics, reset_logged_metrics  # noqa: PLC0415
        from loguru import logger  # noqa: PLC0415

        reports = collectives.is_first_rank(self.tp_group)
        record = self.record.reduce_over_ranks(reports)
        num_resumed = sum(collectives.gather(self.num_resumed * reports))
        seconds = max(collectives.gather(self.seconds))
        tokens = record.decoded + record.prompts
        if self.rank == 0:
            logger.info(f"{self.model_id} {record.summary()}")
            if num_resumed:
                logger.info(f"{self.model_id}: {num_resumed} more questions were answered by an earlier run")
            # Some of lmms-eval's wrappers have logged what this process alone did.
            reset_logged_metrics()
            log_metrics(seconds, tokens, tokens / max(seconds, 1e-9), record.scalar_means())
        super().clean()  # type: ignore[misc]
