"""How lmms-eval asks and scores the shapes questions."""

from typing import Any

from PIL import Image


def visual(doc: dict[str, Any]) -> list[Image.Image]:
    """The question's picture."""
    return [doc["image"].convert("RGB")]


def question(doc: dict[str, Any], lmms_eval_specific_kwargs: dict[str, Any] | None = None) -> str:
    """The question as the model is asked it."""
    return str(doc["question"])


def score(doc: dict[str, Any], results: list[str]) -> dict[str, float]:
    """1 for the right word, whatever its case and punctuation, for the whole and for the question's family."""
    right = float(results[0].strip().strip(".").lower() == doc["answer"])
    return {"accuracy": right, doc["family"]: right}


def mean(values: list[float]) -> float:
    """Share of right answers."""
    return sum(values) / len(values)
