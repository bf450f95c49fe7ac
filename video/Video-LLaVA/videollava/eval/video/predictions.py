"""Reading predictions: one JSON object a line, each broken one named."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any


def read_objects(path: Path, text: bytes) -> Iterator[tuple[str, dict[str, Any]]]:
    """Each line's place, as an error names it, and the JSON object it holds.

    Raises ValueError for a line that holds none.
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
    """The predictions of a file, in its order.

    Raises ValueError for a file without any, or a line that lacks something or repeats an id.
    """
    predictions: dict[int | str, dict[str, Any]] = {}
    for place, record in read_objects(path, text):
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
