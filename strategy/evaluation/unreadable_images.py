"""Images of an evaluation that cannot be read: each is named in the log, and no other answer is lost.

The module handles lmms-eval's requests and documents without importing lmms-eval.
"""

from collections.abc import Callable, Iterator, Mapping
from copy import deepcopy
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

from strategy.distributed import watchdog

# What a chat model is given in place of messages whose images cannot be read.
PLACEHOLDER_MESSAGES = [{"role": "user", "content": [{"type": "text", "text": "?"}]}]


class UnreadableImage(NamedTuple):
    """Stands for a document whose images cannot be decoded, and says why."""

    reason: str


class GuardedSplit:
    """A split of a task that returns `UnreadableImage` for a document whose images cannot be decoded.

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
            document = self.split[number]
            check_images(document)
        # A decoder of untrusted images may raise anything.
        except Exception as error:
            return UnreadableImage(_one_line(error))
        return document


def check_images(value: Any) -> None:
    """Decode every image in nested lists and mappings.

    Raises:
        ValueError: An image is animated.
        Exception: What the decoder of an image raises.
    """
    for image in _images(value):
        # Many cameras store a preview beside the photo, which Pillow counts as a frame.
        if getattr(image, "is_animated", False) and getattr(image, "format", None) != "MPO":
            raise ValueError(f"an animated picture of {image.n_frames} frames, want one frame or a video")
        image.load()


def _images(value: Any) -> Iterator[Any]:
    if isinstance(value, Mapping):
        value = list(value.values())
    if isinstance(value, (list, tuple)):
        for part in value:
            yield from _images(part)
    elif hasattr(value, "load") and hasattr(value, "size"):
        yield value


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def _read_images(doc_to_visual: Callable[[Any], Any], document: Any) -> Any:
    """Return what a task's function makes of a document, or `UnreadableImage`; raise the function's own mistakes."""
    try:
        visuals = doc_to_visual(document)
    except Exception as error:
        if not type(error).__module__.startswith("PIL"):
            raise
        return UnreadableImage(_one_line(error))
    if isinstance(visuals, (list, tuple)) and any(part is None for part in visuals):
        return UnreadableImage("there is none")
    try:
        check_images(visuals)
    except Exception as error:
        return UnreadableImage(_one_line(error))
    return visuals


class _ImageGuard:
    """Puts placeholders in place of unreadable images, and remembers them.

    Attributes:
        reasons: Why the images of a document, given as task, split and number, cannot be read.
    """

    def __init__(self) -> None:
        self.reasons: dict[tuple[Any, ...], str] = {}
        self._last_read: tuple[Any, ...] = ()

    def _remember(self, *document: Any) -> None:
        self._last_read = document

    def splits(self, task_dict: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, GuardedSplit]]:
        """Return the guarded splits of all tasks."""
        return {
            task: {name: GuardedSplit(split, partial(self._remember, task, name)) for name, split in splits.items()}
            for task, splits in task_dict.items()
        }

    def request(self, request: Any) -> Any:
        """Return a copy of a request whose function returns a placeholder for images that cannot be read."""
        arguments = list(request.args)
        # A request to a simple model has the function that returns images third, one to a chat model has the function
        # that returns messages second.
        index = 2 if callable(arguments[2]) else 1
        doc_to_visual, placeholder = arguments[index], PLACEHOLDER_MESSAGES if index == 1 else []

        def read(document: Any) -> Any:
            visuals = document if isinstance(document, UnreadableImage) else _read_images(doc_to_visual, document)
            if not isinstance(visuals, UnreadableImage):
                return visuals
            # Models may call one request's function for a whole batch, so the document that was read last counts.
            self.reasons[self._last_read] = visuals.reason
            return deepcopy(placeholder)

        arguments[index] = read
        return replace(request, arguments=tuple(arguments))


def answer_readable(
    lm: Any,
    requests: list[Any],
    answer: Callable[[list[Any]], list[Any]],
    empty_answer: Any,
    log: Callable[[str], None],
) -> list[Any]:
    """Answer the requests whose images can be read.

    Args:
        lm: lmms-eval's model, whose documents are guarded meanwhile.
        requests: The requests.
        answer: Answers all of them, those with unreadable images from a placeholder.
        empty_answer: What requests with unreadable images get in the end.
        log: Gets a sentence for each of these requests, and one that counts them.
    """
    guard, documents = _ImageGuard(), lm.task_dict
    lm.task_dict = guard.splits(documents)
    try:
        answers = answer([guard.request(request) for request in requests])
    finally:
        lm.task_dict = documents
    left_out = 0
    for number, request in enumerate(requests):
        *_, document, task, split = request.args
        if (reason := guard.reasons.get((task, split, document))) is not None:
            log(f"task {task}, question {document}: not answered, its picture is unreadable ({reason})")
            answers[number] = empty_answer
            left_out += 1
    if left_out:
        log(f"{left_out} of {len(requests)} questions were not answered, their pictures are unreadable")
    return answers
