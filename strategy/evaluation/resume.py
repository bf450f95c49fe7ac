"""Answers of an evaluation, on disk as they are made, so that the same command goes on after a fault."""

import hashlib
import json
import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from strategy.distributed import collectives, processes

AT_ONCE = 64  # questions that are answered before their answers are written


class Journal:
    """The answers of one evaluation in a folder, a file for each process that wrote some.

    settings: what answers depend on besides the question; other settings do not find these answers. writes: whether
    this process does, and not another one that answers the same. Made by all processes, before any of them answers.
    Raises ValueError if another run is writing there, for a file that is damaged before its last line, or where no
    folder can be made.
    """

    def __init__(self, folder: Path, settings: dict[str, Any], writes: bool) -> None:
        self.folder, self.settings = folder, settings
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ValueError(f"resume_folder={folder}: no folder can be made there ({error.strerror})") from None
        if processes.rank() == 0:
            self.lock = FileLock(folder / "lock", timeout=0)
            try:
                self.lock.acquire()
            except Timeout:
                raise ValueError(f"{folder}: another run is writing its answers there; wait, or give another") from None
        self.done = {key: answer for file in sorted(folder.glob("*.jsonl")) for key, answer in _entries(file)}
        # Nobody writes before all have read, since processes that answer together must have the same left to do.
        collectives.gather(None)
        self.stream = (folder / f"{processes.rank()}.jsonl").open("a") if writes else None

    def fill_up(
        self, requests: Sequence[Any], answer: Callable[[list[Any]], list[Any]], nothing: Any
    ) -> tuple[list[Any], int]:
        """All answers to lmms-eval's requests, made by `answer` where there is none yet, and how many there were.

        nothing: an answer that is not worth keeping, so that the next run asks again.
        """
        keys = self._keys(requests)
        missing = [place for place, key in enumerate(keys) if key not in self.done]
        answers = [self.done.get(key) for key in keys]
        for first in range(0, len(missing), AT_ONCE):
            places = missing[first : first + AT_ONCE]
            for place, each in zip(places, answer([requests[place] for place in places]), strict=True):
                answers[place] = each
            self._write({keys[place]: answers[place] for place in places if answers[place] != nothing})
        return answers, len(keys) - len(missing)

    def _keys(self, requests: Sequence[Any]) -> list[str]:
        keys: list[str] = []
        times: Counter[str] = Counter()
        for request in requests:
            # The number of the document among them; what else a pooled request says of itself is its rank's own.
            told = [part for part in request.args if not callable(part)]
            question = [request.request_type, request.task_name, told]
            key = hashlib.sha256(
                json.dumps([self.settings, question], sort_keys=True, default=str).encode()
            ).hexdigest()
            # lmms-eval asks the same several times where a task says so.
            keys.append(f"{key}-{times[key]}")
            times[key] += 1
        return keys

    def _write(self, made: dict[str, Any]) -> None:
        # lmms-eval's own wrappers give a text with what it took.
        made = {key: getattr(each, "text", each) for key, each in made.items()}
        self.done |= made
        if self.stream is None:
            return
        self.stream.writelines(json.dumps(entry) + "\n" for entry in made.items())
        self.stream.flush()
        os.fsync(self.stream.fileno())


def _entries(file: Path) -> Iterator[tuple[str, Any]]:
    """The entries of a file, but for a last one that a kill cut off, which is dropped from it."""
    data = file.read_bytes()
    whole = data[: data.rfind(b"\n") + 1]
    if whole != data and processes.rank() == 0:
        os.truncate(file, len(whole))
    try:
        for line in whole.decode().splitlines():
            key, answer = json.loads(line)
            yield key, answer
    except (ValueError, TypeError) as error:
        raise ValueError(f"{file}: damaged ({error}): remove it, and its questions are asked again") from error
