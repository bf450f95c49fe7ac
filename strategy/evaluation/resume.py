"""The journal of an evaluation's answers, from which the same command resumes after a fault."""

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from strategy.distributed import collectives, processes
from strategy.evaluation.append_log import AppendOnlyLog, acquire_lock, read_log

FLUSH_EVERY = 64  # questions that are answered before their answers are written


class AnswerJournal:
    """The answers of one evaluation in a folder, which has a file for each rank that wrote some.

    Every rank makes its journal before any of them answers.

    Args:
        folder: Where the files lie; it is made if it is missing.
        settings: What answers depend on besides the question, by name. A run with other settings does not find them.
        writes: Whether this rank writes its answers. Of ranks that share a model, and so answer the same, one does.

    Attributes:
        answers: All answers so far, by the key of their question.

    Raises:
        ValueError: Another run is writing to the folder, a file is damaged, or the folder cannot be made.
    """

    def __init__(self, folder: Path, settings: Mapping[str, Any], writes: bool) -> None:
        self.settings = dict(settings)
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ValueError(f"resume_folder={folder}: no folder can be made there ({error.strerror})") from None
        self._lock = None
        if processes.rank() == 0:
            refusal = f"{folder}: another run is writing its answers there; wait, or give another resume_folder"
            self._lock = acquire_lock(folder / "lock", refusal)
        self.answers: dict[str, Any] = {}
        for file in sorted(folder.glob("*.jsonl")):
            self.answers.update(read_log(file, _parse))
        # No rank writes before all have read, since ranks that answer together must have the same left to do.
        collectives.gather(None)
        self._log = AppendOnlyLog(folder / f"{processes.rank()}.jsonl", _parse) if writes else None

    def answer_missing(
        self, requests: Sequence[Any], answer: Callable[[list[Any]], list[Any]], empty_answer: Any
    ) -> tuple[list[Any], int]:
        """Answer those of lmms-eval's requests whose answers are not in the journal, and write these answers.

        Args:
            requests: The requests.
            answer: Answers a list of requests.
            empty_answer: An answer that is not written, so that the next run asks again.

        Returns:
            The answers to all requests, and how many of these the journal held.
        """
        keys = self._keys(requests)
        missing = [index for index, key in enumerate(keys) if key not in self.answers]
        answers = [self.answers.get(key) for key in keys]
        for first in range(0, len(missing), FLUSH_EVERY):
            indices = missing[first : first + FLUSH_EVERY]
            for index, new in zip(indices, answer([requests[index] for index in indices]), strict=True):
                answers[index] = new
            self._write({keys[index]: answers[index] for index in indices if answers[index] != empty_answer})
        return answers, len(keys) - len(missing)

    def _keys(self, requests: Sequence[Any]) -> list[str]:
        keys: list[str] = []
        repeats: Counter[str] = Counter()
        for request in requests:
            # A request's arguments hold its document's number; the functions among them have no lasting name.
            arguments = [part for part in request.args if not callable(part)]
            question = [request.request_type, request.task_name, arguments]
            key = hashlib.sha256(
                json.dumps([self.settings, question], sort_keys=True, default=str).encode()
            ).hexdigest()
            # lmms-eval repeats a request where its task wants several answers.
            keys.append(f"{key}-{repeats[key]}")
            repeats[key] += 1
        return keys

    def _write(self, answers: Mapping[str, Any]) -> None:
        # Some of lmms-eval's own wrappers return the text with what it took to generate it.
        texts = {key: getattr(answer, "text", answer) for key, answer in answers.items()}
        self.answers.update(texts)
        if self._log is not None:
            self._log.append(texts.items())

    def close(self) -> None:
        """Close the file and release the folder."""
        if self._log is not None:
            self._log.close()
        if self._lock is not None:
            self._lock.release()


def _parse(entry: Any) -> tuple[str, Any]:
    """Return the key and the answer of a line."""
    key, answer = entry
    return str(key), answer
