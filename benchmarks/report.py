"""A run of the benchmark as a table and as a picture."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from pytablewriter import MarkdownTableWriter

from benchmarks.targets import targets


def _text(value: float, form: str) -> str:
    return "-" if math.isnan(value) else format(value, form)


def made_with(about: dict[str, Any]) -> str:
    """On what a run was made, in a line."""
    versions = f"torch {about['torch']}, transformers {about['transformers']}, commit {about['commit']}"
    return f"{about['device']}, {about['dtype']}, {versions}"


def tables(found: dict[str, Any]) -> str:
    """The tables of a run, in Markdown: what was measured, and the targets beside it."""
    rows = [
        [
            row["name"],
            row["batch"],
            "/".join(map(str, row["stages"])) or str(found["about"]["visual"]),
            _text(row["prefill"], ".2f"),
            _text(row["graph"], ".2f"),
            _text(row["vision"], ".2f"),
            _text(row["first"], ".2f"),
            _text(row["decode"], ".2f"),
            _text(1000 * row["batch"] / row["decode"], ".0f"),
            _text(row["held"] / 1e6, ".1f"),
            _text(row["peak"] / 1e9, ".1f"),
        ]
        for row in found["rows"]
    ]
    for way, told in found["ways"].items():
        if told["free"] is not None:
            rows.append([f"{way}, free method", 1, "", "", _text(told["free"], ".2f"), *[""] * 6])
        rows.append([f"{way}, arithmetic floor", 1, "", "", _text(told["floor"], ".2f"), *[""] * 6])
    headers = ["", "batch", "visual tokens", "prefill ms", "its graph ms", "vision graph ms", "first token ms"]
    headers += ["ms a token", "tokens/s", "cache MB", "peak GB"]
    measured = MarkdownTableWriter(headers=headers, value_matrix=rows, margin=1).dumps()
    lines = [
        [what, f"{limit:g}", _text(figure, ".3f"), "met" if kept else "missed"]
        for what, limit, figure, kept in targets(found)
    ]
    aims = MarkdownTableWriter(headers=["target", "limit", "measured", ""], value_matrix=lines, margin=1).dumps()
    return f"{measured}\n{aims}" if lines else measured


def scaling_table(about: dict[str, Any], rows: Sequence[Any]) -> str:
    """The table of `benchmarks.scaling`, in Markdown, and on what it was made."""
    lines = [
        [
            row.name,
            "/".join(map(str, row.stages)) or str(about["visual"]),
            _text(row.prefill, ".1f"),
            _text(row.decode, ".1f"),
            _text(row.rate, ".2f"),
            *(_text(spent, ".2f") for spent in row.collectives.values()),
            _text(row.weights / 1e9, ".1f"),
            _text(row.peak / 1e9, ".1f"),
        ]
        for row in rows
    ]
    headers = ["", "visual tokens", "prefill ms", "ms a token", "answers/s"]
    headers += [f"{kind} ms" for kind in rows[0].collectives] + ["weights GB a GPU", "peak GB a GPU"]
    table = MarkdownTableWriter(headers=headers, value_matrix=lines, margin=1).dumps()
    return f"{table}\n{about['processes']} processes, {made_with(about)}"


def picture(found: dict[str, Any], file: Path) -> None:
    """Draw the prefill's time against the visual tokens of the mean layer, with the floor, into a PNG."""
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    curve = sorted(found["ways"].values(), key=lambda told: told["visual_tokens"])
    tokens = [told["visual_tokens"] for told in curve]
    for key, label, style in (
        ("eager", "eager", "o--"),
        ("graph", "graph, fused", "o-"),
        ("floor", "arithmetic floor", ":"),
    ):
        axes.plot(tokens, [told[key] for told in curve], style, label=label)
    axes.set(xlabel="visual tokens in the mean layer", ylabel="prefill, ms", ylim=(0, None))
    axes.set_title(f"{found['about']['backbone']}, {found['about']['device']}")
    axes.legend()
    figure.savefig(file, dpi=150)
