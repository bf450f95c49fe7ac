"""Questions and answers of MSVD, MSRVTT, TGIF and ActivityNet in their published layout."""

import json
import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

EXTENSIONS = (".mp4", ".avi", ".mov", ".mkv", ".webm", ".gif", ".m4v")


@dataclass(frozen=True)
class Sample:
    """A question about a video.

    Attributes:
        id: The id in the files of questions and answers.
        video: The video's name.
        question: The question.
        answer: The right answer.
        type: The kind of question, where the data says so.
    """

    id: Any
    video: str
    question: str
    answer: str
    type: Any = None

    @property
    def key(self) -> str:
        """Return the id as text, since files differ in its type."""
        return str(self.id)


@dataclass(frozen=True)
class LeftOut:
    """A question or an entry that could not be answered, and why."""

    id: Any
    video: str
    reason: str


def read_list(file: str | Path) -> list[Any]:
    """Return the list in a JSON file; raise ValueError that names the file if it is missing or damaged."""
    try:
        entries = json.loads(Path(file).read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"{file}: missing, or not JSON ({error})") from error
    if not isinstance(entries, list):
        raise ValueError(f"{file}: holds a {type(entries).__name__}, want a list of objects")
    return entries


def read_samples(question_file: str | Path, answer_file: str | Path) -> tuple[list[Sample], list[LeftOut]]:
    """Read questions and match them with their answers by question_id.

    Returns:
        The questions in the order of their file, and what is left out: entries that are no object or lack a field, and
        questions without an answer.

    Raises:
        ValueError: A file is no JSON list, or an id comes twice.
    """
    answers: dict[str, Any] = {}
    left_out = []
    for number, entry in enumerate(read_list(answer_file)):
        if missing := _missing(entry, ("question_id", "answer")):
            left_out.append(LeftOut(None, "", f"{answer_file}, entry {number}: {missing}"))
        elif str(entry["question_id"]) in answers:
            raise ValueError(f"{answer_file}: question_id {entry['question_id']!r} comes twice")
        else:
            answers[str(entry["question_id"])] = entry
    samples, seen = [], set()
    for number, entry in enumerate(read_list(question_file)):
        if missing := _missing(entry, ("question_id", "video_name", "question")):
            left_out.append(LeftOut(None, "", f"{question_file}, entry {number}: {missing}"))
            continue
        key = str(entry["question_id"])
        if key in seen:
            raise ValueError(f"{question_file}: question_id {entry['question_id']!r} comes twice")
        seen.add(key)
        if key not in answers:
            left_out.append(LeftOut(entry["question_id"], entry["video_name"], f"no answer in {answer_file}"))
            continue
        known = answers[key]
        kind = known.get("type", entry.get("type"))
        samples.append(
            Sample(entry["question_id"], str(entry["video_name"]), str(entry["question"]), str(known["answer"]), kind)
        )
    return samples, left_out


def _missing(entry: Any, fields: tuple[str, ...]) -> str:
    if not isinstance(entry, dict):
        return f"a {type(entry).__name__}, not an object"
    return ", ".join(f"no {field}" for field in fields if entry.get(field) in (None, ""))


def find_video(folder: str | Path, name: str) -> Path:
    """Find the file of a video, with any of EXTENSIONS, and with or without ActivityNet's `v_` in front.

    Raises:
        ValueError: There is none; the message names the folder and the video.
    """
    for stem in (name, f"v_{name}"):
        for extension in ("", *EXTENSIONS, *map(str.upper, EXTENSIONS)):
            file = Path(folder) / f"{stem}{extension}"
            if os.path.isfile(file):  # `Path.is_file` raises where a name is too long
                return file
    raise ValueError(f"no video {name} in {folder}: tried {', '.join(EXTENSIONS)}, also with v_ in front")


def chunk(samples: list[Sample], count: int, number: int) -> list[Sample]:
    """Return part `number`, from 0, of `count` consecutive parts; raise ValueError if there is no such part."""
    if count < 1 or not 0 <= number < count:
        raise ValueError(f"num_chunks={count}, chunk_idx={number}: chunk_idx goes from 0 to num_chunks - 1")
    size = math.ceil(len(samples) / count)
    return samples[number * size : (number + 1) * size]
