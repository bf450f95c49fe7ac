"""Score the predictions of zero-shot video question answering, by normalised match or by a judge model.

--api_base or --api_key asks a judge behind any OpenAI-compatible endpoint; without them nothing leaves this
machine. A judge's verdicts are written as they arrive, and the same command resumes after a stop.
Exit status: 2 for wrong input, 3 if some predictions got no verdict; the same command requests these again.
"""

import argparse
import hashlib
import json
import math
import os
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import openai
from pytablewriter import MarkdownTableWriter

from videollava.eval.video.judge import DEFAULT_JUDGE, MAX_RETRIES, PROMPT, TIMEOUT, Verdicts, judge
from videollava.eval.video.matching import matches
from videollava.eval.video.predictions import read_predictions

# What ActivityNet-QA means by its numbers.
TYPES = (
    *("motion", "spatial relation", "temporal relation", "yes/no", "color"),
    *("object", "location", "number", "other"),
)


def summary(predictions: Sequence[Mapping[str, Any]], verdicts: Verdicts, judged: bool) -> dict[str, Any]:
    """Return counts and means over some predictions; with a judge, over those with a verdict.

    The standard error is that of a proportion p of n, sqrt(p (1 - p) / n). Means are None if there is no verdict.

    Args:
        predictions: The predictions.
        verdicts: The verdicts by id, also of other predictions.
        judged: Whether the verdicts are a judge's.
    """
    known = [verdicts[one["id"]] for one in predictions if one["id"] in verdicts]
    right, n = sum(verdict["pred"] == "yes" for verdict in known), len(known)
    result = {
        "count": len(predictions),
        "right": right,
        "accuracy": right / n if n else None,
        "standard_error": math.sqrt(right * (n - right) / n**3) if n else None,
    }
    if judged:
        result["mean_score"] = sum(verdict["score"] for verdict in known) / n if n else None
        result["no_verdict"] = len(predictions) - n
    return result


def by_type(predictions: Sequence[Mapping[str, Any]]) -> dict[str, list[Mapping[str, Any]]]:
    """Return the predictions of each question type, numbers first; an empty mapping if none has a type."""
    groups = defaultdict(list)
    for one in predictions:
        groups[one.get("type")].append(one)
    if groups.keys() == {None}:
        return {}

    def name(kind: int | str | None) -> str:
        if kind is None:
            return "no type"
        return f"{kind} {TYPES[kind]}" if isinstance(kind, int) and 0 <= kind < len(TYPES) else str(kind)

    order = sorted(groups, key=lambda kind: (kind is None, isinstance(kind, str), kind))
    return {name(kind): groups[kind] for kind in order}


def cell(value: float | None) -> str | int:
    """Return a number as the table shows it."""
    return value if isinstance(value, int) else "-" if value is None else f"{value:.3f}"


def parse(arguments: list[str] | None = None) -> tuple[argparse.ArgumentParser, argparse.Namespace]:
    """Parse the command line and check it; return also the parser, whose `error` reports what is wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--pred_path", type=Path, required=True, help="a JSON object a line: id, question, answer, pred, perhaps type"
    )
    parser.add_argument("--output_dir", type=Path, help="folder for what is written; that of --pred_path if not given")
    parser.add_argument(
        "--output_json", type=Path, help="<stem>_scores.json, with a judge <stem>_judged_scores.json, if not given"
    )
    parser.add_argument("--api_base", help="the judge's endpoint; OpenAI's own if only --api_key is given")
    parser.add_argument(
        "--api_key", help="better given as the environment variable OPENAI_API_KEY, then with --api_base"
    )
    parser.add_argument(
        "--judge_model",
        help=f"{DEFAULT_JUDGE} if not given, as in published figures. Another judge's figures cannot be compared with "
        "these, and the prompt, which is this script's own, also makes a difference",
    )
    parser.add_argument("--model", help="another name of --judge_model")
    parser.add_argument("--num_tasks", type=int, default=8, help="requests to the judge at a time (%(default)s)")
    options = parser.parse_args(arguments)
    if options.model and options.judge_model:
        parser.error("--model and --judge_model are the same argument: give one of the two")
    options.judge_model = options.judge_model or options.model
    options.judged = options.api_base is not None or options.api_key is not None
    if options.judge_model and not options.judged:
        parser.error(f"--judge_model {options.judge_model}: say where it is with --api_base or --api_key")
    if options.api_base is not None and not re.match("https?://.", options.api_base):
        parser.error(f"--api_base {options.api_base!r}: write the whole address, as in http://localhost:8000/v1")
    if options.num_tasks < 1:
        parser.error(f"--num_tasks {options.num_tasks}: allowed is a whole number from 1 up")
    return parser, options


def main(arguments: list[str] | None = None) -> int:
    """Score, print the table, write the numbers, and return the exit status."""
    parser, options = parse(arguments)
    judged = options.judged
    model, folder = options.judge_model or DEFAULT_JUDGE, options.output_dir or options.pred_path.parent
    stem = options.pred_path.stem + "_judged" * judged
    output = options.output_json or folder / f"{stem}_scores.json"
    try:
        text = options.pred_path.read_bytes()
        predictions = read_predictions(options.pred_path, text)
        folder.mkdir(parents=True, exist_ok=True)
        output.parent.mkdir(parents=True, exist_ok=True)
        if judged:
            # A judge on this machine may need no key, but the client does.
            key = (options.api_key or os.environ.get("OPENAI_API_KEY", "")).strip() or "no-key"
            client = openai.OpenAI(api_key=key, base_url=options.api_base, max_retries=MAX_RETRIES, timeout=TIMEOUT)
            digests = {"predictions": text, "prompt": PROMPT.encode()}
            run = {"judge_model": model} | {k: hashlib.sha256(v).hexdigest()[:16] for k, v in digests.items()}
            verdicts = judge(predictions, client, model, options.num_tasks, folder / f"{stem}.jsonl", run)
        else:
            verdicts = {
                one["id"]: {"pred": "yes" if matches(one["pred"], one["answer"]) else "no"} for one in predictions
            }
    except (OSError, ValueError) as error:
        parser.error(str(error))
    overall = summary(predictions, verdicts, judged)
    types = {name: summary(group, verdicts, judged) for name, group in by_type(predictions).items()}
    missing = [one["id"] for one in predictions if one["id"] not in verdicts]
    scores = {"scored_by": model if judged else "normalised match", "overall": overall, "by_type": types}
    output.write_text(json.dumps(scores | ({"no_verdict": missing} if judged else {}), indent=2) + "\n")
    rows = [[name, *map(cell, row.values())] for name, row in ({"overall": overall} | types).items()]
    headers = ["type", *(key.replace("_", " ") for key in overall)]
    # Without type hints, the writer would shorten 0.750 to 0.75.
    writer = MarkdownTableWriter(headers=headers, value_matrix=rows, type_hints=["str"] * len(headers))
    print(f"{writer.dumps()}\nwritten to {output}")
    if missing:
        print(f"no verdict for {len(missing)} of {len(predictions)}; the same command asks for them again:")
        print(*map(repr, missing), sep="\n")
        return 3
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
