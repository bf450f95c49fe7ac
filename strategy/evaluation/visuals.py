"""The visuals of a question, as a task returns them, turned into what a model takes.

The module handles lmms-eval's documents and requests without importing lmms-eval.
"""

import threading
from collections.abc import Callable, Iterator, Mapping
from copy import deepcopy
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from PIL import Image, UnidentifiedImageError

from strategy.distributed import watchdog
from strategy.evaluation.pictures import check_picture, is_animated, open_picture, picture_in, to_rgb

# What a chat model is given in place of messages whose visuals cannot be read.
PLACEHOLDER_MESSAGES = [{"role": "user", "content": [{"type": "text", "text": "?"}]}]
MEDIA = ("image", "video", "audio")  # the types of a message's parts that are no text


class Unreadable(NamedTuple):
    """Stands for a document whose pictures cannot be decoded, and says why."""

    reason: str


class Preparer(Protocol):
    """How a model wants the parts of a question."""

    def prepare_text(self, text: str) -> str:
        """Return a question's text, in which nothing that somebody typed stands for a visual."""

    def prepare_picture(self, picture: Image.Image) -> Image.Image:
        """Return an RGB picture that the model can take; raise ValueError if it can take none of that kind."""

    def prepare_video(self, file: Path) -> str:
        """Return the path of a video that the model can take; raise ValueError if it cannot be decoded."""

    def check_prompt(self, text: str, visuals: int) -> None:
        """Raise ValueError if a question's prompt would have none of its visuals."""


class GuardedSplit:
    """A split of a task whose pictures are in RGB, see `to_rgb`; `Unreadable` stands for a document where that fails.

    Args:
        split: The split.
        on_access: Called with the number of each document before it is read.
    """

    def __init__(self, split: Any, on_access: Callable[[int], None]) -> None:
        self.split, self.on_access = split, on_access

    def __len__(self) -> int:
        return len(self.split)

    def __getitem__(self, number: int) -> Any:
        if not 0 <= number < len(self.split):
            raise IndexError(f"document {number} of {len(self.split)}")
        self.on_access(number)
        watchdog.heartbeat()
        try:
            return _with_rgb_pictures(self.split[number])
        # A decoder of untrusted pictures may raise anything.
        except Exception as error:
            return Unreadable(one_line(error))


def _with_rgb_pictures(value: Any) -> Any:
    """Return nested lists and mappings with every picture in RGB."""
    if isinstance(value, Mapping):
        return {name: _with_rgb_pictures(part) for name, part in value.items()}
    if type(value) in (list, tuple):
        return type(value)(map(_with_rgb_pictures, value))
    if isinstance(value, Image.Image):
        check_picture(value)
        return to_rgb(value)
    return value


def one_line(error: BaseException) -> str:
    """Return an error's message in one line, with its type where the message alone does not explain it."""
    text = " ".join(str(error).split())[:300]
    kind = type(error).__name__
    if not text:
        return kind
    known = isinstance(error, ValueError) or type(error).__module__.startswith("PIL")
    return text if known else f"{kind}: {text}"


class VisualGuard:
    """Hands a model the visuals of its questions in a form that it can take, and remembers those that it cannot take.

    Args:
        preparer: The model.

    Attributes:
        reasons: Why a question, given as task, split and number of its document, is not answered.
        with_visuals: The questions that came with visuals.
    """

    def __init__(self, preparer: Preparer) -> None:
        self.preparer = preparer
        self.reasons: dict[tuple[Any, ...], str] = {}
        self.with_visuals: set[tuple[Any, ...]] = set()
        self._texts: dict[tuple[Any, ...], str] = {}
        # Several threads may read documents, and each then calls the functions of its own request.
        self._here = threading.local()

    def _remember(self, *document: Any) -> None:
        self._here.last_read = document

    def splits(self, task_dict: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, GuardedSplit]]:
        """Return the guarded splits of all tasks."""
        return {
            task: {name: GuardedSplit(split, partial(self._remember, task, name)) for name, split in splits.items()}
            for task, splits in task_dict.items()
        }

    def request(self, request: Any) -> Any:
        """Return a copy of a request with its text prepared, whose function returns prepared visuals or messages.

        The function returns a placeholder for visuals that cannot be read.
        """
        arguments = list(request.args)
        # A request to a simple model has the function that returns visuals third, one to a chat model has the function
        # that returns messages second.
        index = 2 if callable(arguments[2]) else 1
        function, simple = arguments[index], index == 2
        if simple:
            arguments[0] = self._texts[question(request)] = self.preparer.prepare_text(arguments[0])

        def read(document: Any) -> Any:
            # Models may call one request's function for a whole batch, so the document that was read last counts.
            key, prepare = self._here.last_read, self._visuals if simple else self._messages
            if isinstance(document, Unreadable):
                return self._refuse(key, f"its picture is unreadable ({document.reason})", simple)
            try:
                found = function(document)
            except Exception as error:
                if not type(error).__module__.startswith("PIL"):
                    raise  # a mistake of the task's
                return self._refuse(key, f"its picture is unreadable ({one_line(error)})", simple)
            try:
                return prepare(found, key)
            except _UnreadableError as error:
                return self._refuse(key, f"its picture or video is unreadable ({error})", simple)
            except ValueError as error:
                return self._refuse(key, one_line(error), simple)

        arguments[index] = read
        return replace(request, arguments=tuple(arguments))

    def _refuse(self, key: tuple[Any, ...], reason: str, simple: bool) -> Any:
        self.reasons[key] = reason
        return [] if simple else deepcopy(PLACEHOLDER_MESSAGES)

    def _visuals(self, found: Any, key: tuple[Any, ...]) -> list[Any]:
        visuals = [self._prepared(visual) for visual in _flat(found)]
        if visuals:
            self.with_visuals.add(key)
            self.preparer.check_prompt(self._texts.get(key, ""), len(visuals))
        return visuals

    def _messages(self, found: Any, key: tuple[Any, ...]) -> list[dict[str, Any]]:
        messages = []
        for message in found:
            content = message["content"]
            parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
            messages.append({**message, "content": [self._part(part, key) for part in parts]})
        return messages

    def _part(self, part: Mapping[str, Any], key: tuple[Any, ...]) -> dict[str, Any]:
        if part["type"] not in MEDIA:
            return {**part, "text": self.preparer.prepare_text(part["text"])}
        self.with_visuals.add(key)
        visual = self._prepared(part["url"])
        # lmms-eval names the type by the file's extension: a GIF is a picture to it, and a .webm a sound.
        return {**part, "type": "video" if isinstance(visual, str) else "image", "url": visual}

    def _prepared(self, visual: Any) -> Image.Image | str:
        """Return a visual as the model takes it; raise `_UnreadableError` if that is not possible."""
        try:
            if visual is None:
                raise ValueError("there is none")
            if (picture := picture_in(visual)) is None and isinstance(visual, (str, Path)):
                picture = self._picture_of_file(Path(visual))
                if picture is None:
                    return self.preparer.prepare_video(Path(visual))
            if picture is None:
                raise ValueError(f"a {type(visual).__name__}, want a picture, or the path of a picture or a video")
            check_picture(picture)
            return self.preparer.prepare_picture(to_rgb(picture))
        # A decoder of untrusted pictures and videos may raise anything.
        except Exception as error:
            raise _UnreadableError(one_line(error)) from error

    def _picture_of_file(self, file: Path) -> Image.Image | None:
        """Return the picture in a file; None for an animated picture, and for what is no picture."""
        if not file.is_file():
            raise ValueError(f"there is no file {file}")
        try:
            with Image.open(file) as picture:
                if is_animated(picture):
                    return None
        except UnidentifiedImageError:
            return None
        return open_picture(file)


class _UnreadableError(Exception):
    """A visual cannot be read."""


def _flat(found: Any) -> Iterator[Any]:
    """Yield the visuals in what a task's function returned: None, a visual, or nested lists of visuals."""
    if isinstance(found, (list, tuple)):
        for part in found:
            if part is None:
                yield None
            else:
                yield from _flat(part)
    elif found is not None:
        yield found


def question(request: Any) -> tuple[Any, ...]:
    """Return what names a request's question: the task, the split and the number of the document."""
    *_, document, task, split = request.args
    return task, split, document
