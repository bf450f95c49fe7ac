"""Questions one by one: what cannot be answered is named, and costs no other answer.

Only what concerns the model itself, such as memory that runs out or a lost process, ends the run.
"""

import gc
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, Protocol

import torch
from torch import distributed as dist

from strategy.distributed import watchdog, zero
from strategy.evaluation.batch_size import BatchSize
from strategy.evaluation.visuals import Preparer, VisualGuard, one_line, question
from strategy.metrics.record import RunRecord

# Questions, or batches if these are more, that a model is handed together. If one of a group fails, the group is asked
# again in batches; what follows a group is not prepared ahead.
GROUP, GROUP_BATCHES = 256, 16
GIVE_UP_AFTER = 16  # questions that all fail before any is answered: then not the questions are to blame
FATAL = (torch.OutOfMemoryError, torch.AcceleratorError, dist.DistError, MemoryError, watchdog.PassLostError)
FATAL_MARKS = ("CUDA error", watchdog.GLOO_MARK)  # in the messages of errors without a type of their own


class Model(Preparer, Protocol):
    """A model of lmms-eval.

    Attributes:
        task_dict: The documents by task and split; they are guarded while questions are answered.
        record: What was prefilled.
        shards: What several ranks share weights by, if they do.
    """

    task_dict: Any
    record: RunRecord
    shards: zero.ZeroShards | None


def concerns_the_model(error: Exception) -> bool:
    """Return whether an error concerns the model itself, so that no other question could be answered either."""
    return isinstance(error, FATAL) or any(mark in str(error) for mark in FATAL_MARKS)


def _with_own_options(request: Any) -> Any:
    return replace(request, arguments=tuple(dict(part) if isinstance(part, dict) else part for part in request.args))


def _kind(request: Any) -> tuple[Any, ...]:
    """Return what requests have in common that a model answers in one batch."""
    options = [part for part in request.args if isinstance(part, dict)]
    return (*request.args[-2:], repr(options))


class QuestionAnswerer:
    """Answers requests of lmms-eval so that each question that fails is named and left without an answer.

    Args:
        model: The model.
        answer: Answers a list of requests.
        empty_answer: What questions get that cannot be answered.
        batches: How many questions the model answers at a time.
        log: Gets a sentence for each of these questions.

    Attributes:
        unanswered: How many requests were left without an answer.
    """

    def __init__(
        self,
        model: Model,
        answer: Callable[[list[Any]], list[Any]],
        empty_answer: Any,
        batches: BatchSize,
        log: Callable[[str], None],
    ) -> None:
        self.model, self.answer, self.empty_answer, self.batches, self.log = model, answer, empty_answer, batches, log
        self.guard = VisualGuard(model)
        self.unanswered = self._answered = 0
        self._in_one_batch = False  # whether the model was asked all of the last part at once
        self._failed: set[tuple[Any, ...]] = set()

    def __call__(self, requests: Sequence[Any]) -> list[Any]:
        """Answer requests, in order.

        Raises:
            ValueError: The first questions fail one after the other, and none is answered.
            Exception: What concerns the model itself.
        """
        documents = self.model.task_dict
        self.model.task_dict = self.guard.splits(documents)
        try:
            guarded = [self.guard.request(request) for request in requests]
            answers: list[Any] = []
            while left := guarded[len(answers) :]:
                size = self.batches.size
                part = left[: size if self.batches.growing else max(GROUP, GROUP_BATCHES * size)]
                self.batches.begin()
                self._in_one_batch = len(set(map(_kind, part))) == 1
                answers += self._answer_part(part)
                self.batches.grow(len(part) if self._in_one_batch else 0)
        finally:
            self.model.task_dict, self.batches.asked = documents, 0
        for number, request in enumerate(requests):
            if (reason := self.guard.reasons.get(question(request))) is not None:
                task, _, document = question(request)
                self.log(f"task {task}, question {document}: not answered, {reason}")
                answers[number] = self.empty_answer
                self.unanswered += 1
        return answers

    def _answer_part(self, part: list[Any]) -> list[Any]:
        """Answer some requests; if that fails, in smaller batches or parts, down to single ones."""
        record = self.model.record
        before, self.batches.asked = record.snapshot(), len(part)
        try:
            # Some wrappers take options out of a request, which may have to be asked again.
            answers = self.answer([_with_own_options(request) for request in part])
            self._check_visuals(part, record.samples - before["samples"])
        except Exception as error:
            shrunk = self._takes_smaller_batches(error)
            if not shrunk and self._ends_the_run(error):
                raise
            record.restore(before)
            if not shrunk and len(part) == 1:
                self._fail(part[0], error)
                return [self.empty_answer]
        else:
            self._answered += sum(question(request) not in self.guard.reasons for request in part)
            return answers
        if shrunk:
            # Out here nothing holds the error, and with it what its frames hold.
            gc.collect()
            torch.cuda.empty_cache()
            return self._answer_part(part)
        self._in_one_batch = False
        size = self.batches.size if len(part) > self.batches.size else 1
        parts = (part[first : first + size] for first in range(0, len(part), size))
        return [answer for each in parts for answer in self._answer_part(each)]

    def _check_visuals(self, part: list[Any], prefilled: int) -> None:
        """Raise ValueError if fewer prompts had visuals than questions came with some."""
        asked = map(question, part)
        wanted = sum(key in self.guard.with_visuals and key not in self.guard.reasons for key in asked)
        if prefilled < wanted:
            raise ValueError("none of its visuals is in the prompt")

    def _others_wait(self) -> bool:
        """Return whether other ranks wait in the middle of the layers."""
        return self.model.shards is not None and self.model.shards.in_pass

    def _takes_smaller_batches(self, error: Exception) -> bool:
        """Ask fewer questions at a time from now on if an error is a lack of memory, and return whether that is so."""
        return isinstance(error, torch.OutOfMemoryError) and not self._others_wait() and self.batches.shrink()

    def _ends_the_run(self, error: Exception) -> bool:
        """Return whether an error concerns the model rather than a question."""
        return self._others_wait() or concerns_the_model(error)

    def _fail(self, request: Any, error: Exception) -> None:
        reason = one_line(error)
        self.guard.reasons[question(request)] = reason
        self._failed.add(question(request))
        if not self._answered and len(self._failed) >= GIVE_UP_AFTER:
            raise ValueError(f"the first {len(self._failed)} questions all failed, the last one: {reason}") from error
