"""The mixin of every lmms-eval model of this repository, for one process or several.

The module imports lmms-eval only once the answers are there.
"""

import atexit
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import astuple, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from PIL import Image
from torch import nn

from strategy.attach import attach
from strategy.config import VTRConfig
from strategy.distributed import collectives, processes, tensor_parallel, zero
from strategy.evaluation import digest
from strategy.evaluation.batch_size import BatchSize
from strategy.evaluation.questions import QuestionAnswerer
from strategy.evaluation.requests import answer_longest_first, answer_own, pool_requests
from strategy.evaluation.resume import AnswerJournal

# Settings that cannot change answers, and are ignored on resume; of the weights the content counts, not the path.
IGNORED_ON_RESUME = (
    *("batch_size", "max_batch_size", "device", "device_map", "tensor_parallel", "zero_stage"),
    *("prepare_ahead", "resume_folder", "engine", "pretrained"),
)


def what_answers_depend_on(module: str, weights: Iterable[str | Path]) -> dict[str, str]:
    """Return digests of the code and of the weights that make answers, and the versions of libraries.

    Args:
        module: A module of the backbone's package.
        weights: The folders of the weights.
    """
    code = digest.of_code(("strategy", module.partition(".")[0]))
    return {"code": code, "weights": digest.of_weights(weights)} | digest.of_versions()


@dataclass
class Totals:
    """How many requests there were: all, those that an earlier run had answered, and those left without an answer.

    changed: those that were asked again, since their documents have changed.
    """

    asked: int = 0
    resumed: int = 0
    unanswered: int = 0
    changed: int = 0

    def sentences(self) -> Iterator[tuple[str, str]]:
        """Yield what there is to say about them, each sentence with the level at which it is logged."""
        if self.asked == self.resumed:
            where = f"all {self.asked} were answered by an earlier run"
            yield "INFO", f"no question reached the model: {where if self.asked else 'all answers were in a cache'}"
        elif self.resumed:
            yield "INFO", f"{self.resumed} more questions were answered by an earlier run"
        if self.changed:
            yield "WARNING", f"{self.changed} questions were asked again, since their documents have changed"
        if self.unanswered:
            yield "ERROR", f"{self.unanswered} of {self.asked} questions have no answer, see above"


class PrunedModelMixin:
    """A mixin: list it before the lmms-eval class among the bases of a model.

    Attributes:
        model_id: The model's name in lmms-eval, with which its messages begin.
        rank: This process's number, as lmms-eval's classes set it.
        record: What was kept and what it cost.
        totals: The requests of this process.
        batches: How many questions are answered at a time.
        workers: How many threads prepare questions ahead.
    """

    model_id: str
    rank: int
    task_dict: Any
    batches: BatchSize
    workers: int

    @property
    def batch_size(self) -> int:
        """Return how many questions are answered at a time."""
        return self.batches.size

    def prepare_text(self, text: str) -> str:
        """Return a question's text, in which nothing that somebody typed stands for a visual."""
        return text

    def prepare_picture(self, picture: Image.Image) -> Image.Image:
        """Return an RGB picture that the model can take."""
        return picture

    def prepare_video(self, file: Path) -> str:
        """Return the path of a video that the model can take.

        Raises:
            ValueError: The model takes no videos, or this one cannot be decoded.
        """
        raise ValueError(f"{file} is no picture, and {self.model_id} takes pictures only")

    def check_prompt(self, text: str, visuals: int) -> None:
        """Raise ValueError if a question's prompt would have none of its visuals."""

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
        arguments = _parsed(cls.model_id, arg_string)
        others = {name: value for name, value in (additional_config or {}).items() if value is not None}
        for name in arguments.keys() & others.keys():
            raise SystemExit(f"{cls.model_id}: {name} is among --model_args: give it as --{name} {arguments[name]}")
        return cls(**arguments, **others)

    def open_journal(
        self, config: VTRConfig, arguments: Mapping[str, Any], tp_size: int, weights: Iterable[str | Path]
    ) -> AnswerJournal | None:
        """Open the journal in the folder that the model argument `resume_folder` names; return None without one.

        Args:
            config: What to prune.
            arguments: The arguments of the model.
            tp_size: How many ranks share a model by tensor parallelism.
            weights: The folders of the weights.

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
        settings |= what_answers_depend_on(type(self).__module__, [*weights, *config.weight_sources])
        # The first of the ranks that share a model writes.
        journal = AnswerJournal(Path(folder), settings, writes=processes.rank() % tp_size == 0)
        if (difference := journal.difference()) and processes.rank() == 0:
            self.log("WARNING", difference)
        return journal

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
        self.totals = Totals()

    def answer_requests(
        self,
        requests: Sequence[Any],
        answer: Callable[[list[Any]], list[Any]],
        empty_answer: Any,
        batches: BatchSize | None = None,
    ) -> list[Any]:
        """Answer lmms-eval's requests together with the other ranks; see `answer_own` and `QuestionAnswerer`.

        Args:
            requests: The requests of this rank.
            answer: Answers a list of requests.
            empty_answer: What padding requests and questions get that cannot be answered, and what the journal does not
                keep.
            batches: How many requests are answered at a time, if not as many as questions.
        """
        batches, documents = batches or self.batches, partial(_document_digest, self)
        answer_each = QuestionAnswerer(self, answer, empty_answer, batches, partial(self.log, "ERROR"))

        def answer_in_lockstep(own: list[Any]) -> list[Any]:
            self.totals.asked += len(own)
            with zero.lockstep(self.shards):
                if self.journal is None:
                    return answer_each(own)
                answers, num_resumed = self.journal.answer_missing(
                    own, answer_each, empty_answer, documents, lambda: batches.size, self.workers
                )
            self.totals.resumed += num_resumed
            self.totals.changed = self.journal.num_changed
            return answers

        start = time.perf_counter()
        if self.tp_group or self.shards:
            # lmms-eval does not call a rank whose answers are all in its cache; here the others name that rank.
            collectives.gather(None)
        try:
            requests, own = pool_requests(requests, self.tp_group)
            ordered = partial(answer_longest_first, answer_in_lockstep) if batches.is_auto else answer_in_lockstep
            answers = answer_own(requests, ordered, empty_answer)[own]
        except ValueError as error:
            raise SystemExit(f"{self.model_id}: {error}") from None
        batches.finish()
        self.totals.unanswered += answer_each.unanswered
        if answer_each.unanswered:
            self.log("ERROR", f"{answer_each.unanswered} of {len(requests)} questions were not answered")
        self.seconds += time.perf_counter() - start
        return answers

    def log(self, level: str, sentence: str) -> None:
        """Log a sentence about this model."""
        from loguru import logger  # noqa: PLC0415

        logger.log(level, f"{self.model_id}: {sentence}")

    def clean(self) -> None:
        """Log what the answers of all ranks cost, and release the model; lmms-eval calls it once, after the answers."""
        from lmms_eval.models.model_utils.gen_metrics import log_metrics, reset_logged_metrics  # noqa: PLC0415
        from loguru import logger  # noqa: PLC0415

        reports = collectives.is_first_rank(self.tp_group)
        record = self.record.reduce_over_ranks(reports)
        counts = collectives.gather(astuple(self.totals) if reports else None)
        totals = Totals(*map(sum, zip(*filter(None, counts), strict=True)))
        seconds = max(collectives.gather(self.seconds))
        tokens = record.decoded + record.prompts
        if self.rank == 0:
            # Some of lmms-eval's wrappers have logged what this process alone did.
            reset_logged_metrics()
            if totals.asked > totals.resumed:
                logger.info(f"{self.model_id} {record.summary()}")
                log_metrics(seconds, tokens, tokens / max(seconds, 1e-9), record.scalar_means())
            for level, sentence in totals.sentences():
                self.log(level, sentence)
            if report := record.graph_report():
                self.log("INFO", f"decisions about CUDA graphs:\n{report}")
        super().clean()  # type: ignore[misc]


def _document_digest(model: PrunedModelMixin, request: Any) -> str:
    """Return a digest of what a request's functions make of its document: visuals, messages or a target."""
    *_, number, task, split = request.args
    try:
        document = model.task_dict[task][split][number]
        return digest.of_value([part(document) for part in request.args if callable(part)])
    # A decoder of untrusted pictures may raise anything; such a question gets no answer that is kept.
    except Exception:
        return "unreadable"


def _parsed(model_id: str, arg_string: str) -> dict[str, Any]:
    """Return the arguments in a text, without the quotes around a value."""
    from lmms_eval.utils import simple_parse_args_string  # noqa: PLC0415

    try:
        return {name: _unquoted(value) for name, value in simple_parse_args_string(arg_string).items()}
    except ValueError:
        raise SystemExit(
            f"{model_id}: --model_args {arg_string}: want name=value,... with quotes around a value that has "
            "commas, quotes or brackets itself, as in --model_args 'pretrained=\"/data/a,b\"'"
        ) from None


def _unquoted(value: Any) -> Any:
    """Return a text without the quotes around it, if there are any; other values as they are."""
    if isinstance(value, str) and len(value) > 1 and value[0] == value[-1] and value[0] in "\"'":
        return value[1:-1]
    return value
