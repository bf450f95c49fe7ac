"""A log of answers that loses nothing to a kill: one JSON value on each line, each on disk before the next is made."""

import json
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Generic, TypeVar

from filelock import FileLock, Timeout

T = TypeVar("T")


def acquire_lock(lock_file: Path, refusal: str) -> FileLock:
    """Lock a file until the lock is released or the process ends.

    Raises:
        ValueError: Another process holds the lock; `refusal` is the message.
    """
    lock = FileLock(lock_file, timeout=0)
    try:
        lock.acquire()
    except Timeout:
        raise ValueError(refusal) from None
    return lock


def read_log(file: Path, parse: Callable[[Any], T]) -> list[T]:
    """Return the values of a log, without a last line that a kill cut off; a file that is missing has none.

    Args:
        file: The log. It is not changed, so that another process may be its owner.
        parse: Turns a JSON value into a value of the log; raises KeyError, TypeError or ValueError for a wrong one.

    Raises:
        ValueError: A whole line holds no JSON value, or a wrong one.
    """
    return _read(file, parse)[0]


def _read(file: Path, parse: Callable[[Any], T]) -> tuple[list[T], int]:
    """Return the values of a log as `read_log` does, and how many bytes they take."""
    data = file.read_bytes() if file.exists() else b""
    *lines, torn = data.split(b"\n")
    values = []
    for number, line in enumerate(lines, 1):
        try:
            values.append(parse(json.loads(line)))
        except (KeyError, TypeError, ValueError, RecursionError) as error:
            raise ValueError(
                f"{file}: damaged in line {number} ({error}): remove it, and its questions are asked again"
            ) from error
    return values, len(data) - len(torn)


class AppendOnlyLog(Generic[T]):
    """A file of JSON values, one on each line, to which one process appends.

    The owner holds a lock meanwhile, see `acquire_lock`; it may cover more than this file. A last line that a kill cut
    off is removed from the file when the log is opened. As long as an error is raised instead, the file stays as it is.

    Args:
        file: The log, which is made if it is missing.
        parse: As for `read_log`.

    Attributes:
        values: What the file held when the log was opened.

    Raises:
        ValueError: As for `read_log`.
    """

    def __init__(self, file: Path, parse: Callable[[Any], T]) -> None:
        self.file = file
        self.values, length = _read(file, parse)
        self._stream = file.open("ab", buffering=0)
        self._stream.truncate(length)

    def append(self, values: Iterable[Any]) -> None:
        """Append values, which are on disk when this returns.

        After an error the file holds none of them.

        Raises:
            OSError: The file cannot be written.
            TypeError: A value cannot be written as JSON.
        """
        data = memoryview("".join(json.dumps(value) + "\n" for value in values).encode())
        end = self._stream.seek(0, os.SEEK_END)
        try:
            while data:
                data = data[self._stream.write(data) :]
            os.fsync(self._stream.fileno())
        except BaseException:
            self._stream.truncate(end)
            raise

    def close(self) -> None:
        """Close the file."""
        self._stream.close()
