"""Reading of predictions, one JSON object on each line; an error names the line that is broken."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any


def _read_objects(path: Path, text: bytes) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the JSON object of each line, with the line's place as errors name it.

    Raises:
        ValueError: A line holds no JSON object.
    """
    for number, line in enumerate(text.split(b"\n"), 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):
            raise ValueError(f"{path}, line {number}: not JSON; write one whole JSON object on each line") from None
        if not isinstance(record, dict):
            raise ValueError(f"{path}, line {number}: JSON, but not an object; write one object on each line")
        yield f"{path}, line {number}", record


def read_predictions(path: Path, text: bytes) -> list[dict[str, Any]]:
    """Return the predictions of a file, in its order.

    Args:
        path: The file, for error messages.
        text: What it holds.

    Raises:
        ValueError: There are no predictions, a line lacks a field or has a wrong one, or an id comes twice.
    """
    predictions: dict[int | str, dict[str, Any]] = {}
    for place, record in _read_objects(path, text):
        if missing := [key for key in ("id", "question", "answer", "pred") if key not in record]:
            raise ValueError(f"{place}: no {', '.join(missing)}; a prediction has id, question, answer and pred")
        for key in ("question", "answer", "pred"):
            if not isinstance(record[key], str):
                raise ValueError(f"{place}: {key}={record[key]!r}; write a text in quotes")
        for key, allowed in (("id", (int, str)), ("type", (int, str, type(None)))):
            if type(record.get(key)) not in allowed:
                raise ValueError(f"{place}: {key}={record[key]!r}; allowed are a whole number and a text")
        if record["id"] in predictions:
            raise ValueError(f"{place}: id {record['id']!r} stood on an earlier line; keep one of the two")
        predictions[record["id"]] = record
    if not predictions:
        raise ValueError(f"{path}: no predictions; write one JSON object on each line")
    return list(predictions.values())
