"""The journal of an evaluation's answers, from which the same command resumes after a fault."""

import hashlib
import json
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any, NamedTuple

from strategy.distributed import collectives, processes
from strategy.evaluation.ahead import prepare_ahead
from strategy.evaluation.append_log import AppendOnlyLog, acquire_lock, read_log
from strategy.evaluation.files import write_whole

FLUSH_EVERY = 16  # batches that are answered before their answers are written
SETTINGS = ".settings.json"
DIGESTS = ("code", "weights")  # settings whose values mean nothing to people


class Entry(NamedTuple):
    """An answer: the run that made it, and the digests of its question and of its document."""

    run: str
    question: str
    document: str
    answer: Any


class AnswerJournal:
    """The answers of evaluations in a folder, which has a file for each rank that wrote some.

    An answer is found again by what it depends on: the settings of its run, its question, and the content of its
    document. Nothing is deleted, so one folder may serve several runs. Every rank makes its journal before any of them
    answers.

    Args:
        folder: Where the files lie; it is made if it is missing.
        settings: What answers depend on besides the question and its document, by name; each run with settings of its
            own has a file with them.
        writes: Whether this rank writes its answers. Of ranks that share a model, and so answer the same, one does.

    Attributes:
        num_changed: Questions that were answered about a document that has changed since.

    Raises:
        ValueError: Another run is writing to the folder, a file is damaged, or the folder cannot be made.
    """

    def __init__(self, folder: Path, settings: Mapping[str, Any], writes: bool) -> None:
        self.folder, self.settings, self.num_changed = folder, json.loads(json.dumps(settings, default=str)), 0
        self._run = _digest(self.settings)
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ValueError(f"resume_folder={folder}: no folder can be made there ({error.strerror})") from None
        self._lock = None
        if processes.rank() == 0:
            refusal = f"{folder}: another run is writing its answers there; wait, or give another resume_folder"
            self._lock = acquire_lock(folder / "lock", refusal)
        entries = [entry for file in sorted(folder.glob("*.jsonl")) for entry in read_log(file, _parse)]
        self._answers: dict[str, dict[str, Any]] = defaultdict(dict)
        for entry in entries:
            if entry.run == self._run:
                self._answers[entry.question][entry.document] = entry.answer
        self._num_others = sum(entry.run != self._run for entry in entries)
        # No rank writes before all have read, since ranks that answer together must have the same left to do.
        collectives.gather(None)
        self._log = AppendOnlyLog(folder / f"{processes.rank()}.jsonl", _parse) if writes else None
        if processes.rank() == 0:
            write_whole(folder / f"{self._run}{SETTINGS}", json.dumps(self.settings, indent=1).encode())

    def difference(self) -> str | None:
        """Return a sentence about what keeps the folder's answers from being used; None if this run has some there."""
        if self._answers or not self._num_others:
            return None
        others = [
            json.loads(file.read_bytes())
            for file in sorted(self.folder.glob(f"*{SETTINGS}"))
            if file.name != f"{self._run}{SETTINGS}"
        ]
        differences = [differing(other, self.settings) for other in others]
        nearest = min(differences, key=len, default=["they name no settings"])
        return (
            f"{self.folder} holds {self._num_others} answers of other runs, which are not used; the nearest of these "
            f"runs differs in this: {'; '.join(nearest)}"
        )

    def answer_missing(
        self,
        requests: Sequence[Any],
        answer: Callable[[list[Any]], list[Any]],
        empty_answer: Any,
        document_digest: Callable[[Any], str],
        batch_size: Callable[[], int] = lambda: 1,
        workers: int = 0,
    ) -> tuple[list[Any], int]:
        """Answer those of lmms-eval's requests whose answers are not in the journal, and write these answers.

        Args:
            requests: The requests.
            answer: Answers a list of requests.
            empty_answer: An answer that is not written, so that the next run asks again.
            document_digest: Returns a digest of what a request is about.
            batch_size: Returns how many requests are answered at a time, which may change meanwhile.
            workers: How many threads compute digests; with 0 the calling thread does.

        Returns:
            The answers to all requests, and how many of these the journal held.
        """
        keys = _keys(requests)
        answers: list[Any] = [None] * len(keys)
        missing = []
        for index, key in enumerate(keys):
            known = self._answers.get(key)
            # Only where there is an answer its document has to be read.
            document = document_digest(requests[index]) if known else ""
            if known and document in known:
                answers[index] = known[document]
            else:
                missing.append(index)
                self.num_changed += bool(known)
        left = missing
        while left:
            together = FLUSH_EVERY * batch_size()
            indices, left = left[:together], left[together:]
            for index, new in zip(indices, answer([requests[index] for index in indices]), strict=True):
                answers[index] = new
            found = [index for index in indices if answers[index] != empty_answer]
            with closing(prepare_ahead(document_digest, (requests[index] for index in found), workers)) as documents:
                self._add(
                    # Some of lmms-eval's own wrappers return the text with what it took to generate it.
                    Entry(self._run, keys[index], document, getattr(answers[index], "text", answers[index]))
                    for index, document in zip(found, documents, strict=True)
                )
        return answers, len(keys) - len(missing)

    def _add(self, entries: Iterable[Entry]) -> None:
        entries = list(entries)
        for entry in entries:
            self._answers[entry.question][entry.document] = entry.answer
        if self._log is not None:
            self._log.append(entries)

    def close(self) -> None:
        """Close the file and release the folder."""
        if self._log is not None:
            self._log.close()
        if self._lock is not None:
            self._lock.release()


def _keys(requests: Sequence[Any]) -> list[str]:
    """Return what tells the requests of a run apart."""
    keys: list[str] = []
    repeats: Counter[str] = Counter()
    for request in requests:
        # A request's arguments hold its document's number; the functions among them have no lasting name.
        arguments = [part for part in request.args if not callable(part)]
        key = _digest([request.request_type, request.task_name, arguments])
        # lmms-eval repeats a request where its task wants several answers.
        keys.append(f"{key}-{repeats[key]}")
        repeats[key] += 1
    return keys


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()[:32]


def differing(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[str]:
    """Return in words which settings of two runs differ."""
    return [
        f"other {name}" if name in DIGESTS else f"{name} was {before.get(name)}, is {after.get(name)}"
        for name in sorted({*before, *after})
        if before.get(name) != after.get(name)
    ]


def _parse(entry: Any) -> Entry:
    """Return the answer in a line."""
    if len(entry) == 2:  # the form of version 0.2.0, which does not name the run
        return Entry("", str(entry[0]), "", entry[1])
    run, question, document, answer = entry
    return Entry(str(run), str(question), str(document), answer)
