"""A run of a benchmark as tables and as a picture."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from pytablewriter import MarkdownTableWriter

from benchmarks.targets import targets
from comparison.columns import Column, number

Row = Mapping[str, Any]
"""The fields of a `measure.Row` or `scaling.ScaledRow`."""


def _column(header: str, form: str, key: str, factor: float = 1) -> Column[Row]:
    return Column(key=key, header=header, format=number(form), get=lambda row: row[key] * factor)


def _part_column(part: str) -> Column[Row]:
    """Return the column of a part of an answer: its ms, and its share of the sum of all parts."""

    def text(value: tuple[float, float]) -> str:
        ms, whole = value
        return f"{ms:.2f} ({100 * ms / whole:.0f} %)"

    return Column(
        key=part,
        header=f"{part} ms",
        format=text,
        get=lambda row: (row[part], sum(row[each] for each in ANSWER_PARTS)),
    )


def _first_columns(visual: int) -> list[Column[Row]]:
    """Return the columns that say what was measured, of prompts with so many visual tokens."""
    return [
        Column(key="name", header="", get=lambda row: row["name"]),
        Column(key="batch", header="batch", get=lambda row: row["batch"]),
        Column(
            key="stages",
            header="visual tokens",
            get=lambda row: "/".join(map(str, row["stages"])) or str(visual),
        ),
    ]


SPEED_COLUMNS = [
    _column("prefill ms", ".2f", "prefill"),
    _column("its graph ms", ".2f", "graph"),
    _column("vision graph ms", ".2f", "vision"),
    _column("first token ms", ".2f", "first"),
    _column("ms a token", ".2f", "decode"),
    Column[Row](
        key="decode", header="tokens/s", format=number(".0f"), get=lambda row: 1000 * row["batch"] / row["decode"]
    ),
    _column("cache MB", ".1f", "held", 1e-6),
    _column("peak GB", ".1f", "peak", 1e-9),
]
SCALING_COLUMNS = [
    _column("prefill ms", ".1f", "prefill"),
    _column("ms a token", ".1f", "decode"),
    _column("answers/s", ".2f", "rate"),
]
MEMORY_COLUMNS = [_column("weights GB a GPU", ".1f", "weights", 1e-9), _column("peak GB a GPU", ".1f", "peak", 1e-9)]
SERVING_COLUMNS = [
    Column[Row](key="name", header="", get=lambda row: row["name"]),
    _column("answers/s", ".1f", "cold"),
    _column("pictures cached", ".1f", "warm"),
    _column("first token ms", ".1f", "first"),
    _column("ms a token", ".2f", "token"),
    _column("requests at once", "d", "at_once"),
    _column("served answers/s", ".1f", "served"),
    _column("first token ms, median", ".0f", "served_first"),
    _column("99 %", ".0f", "served_first_99"),
]


def _beside_floor(title: str, key: str, floor: str) -> list[Column[Row]]:
    """Return the columns of a time, of the least one, and of how many times the least it is."""
    return [
        _column(title, ".2f", key),
        _column("floor", ".2f", floor),
        Column(key=key, header="times floor", format=number(".2f"), get=lambda row: row[key] / row[floor]),
    ]


POINT_COLUMNS = [
    *_beside_floor("prefill ms a prompt", "prefill", "prefill_floor"),
    *_beside_floor("decode ms a step", "decode", "decode_floor"),
    _column("cache GB", ".2f", "cache", 1e-9),
    _column("peak GB", ".1f", "peak", 1e-9),
    Column[Row](key="note", header="note", get=lambda row: row["note"]),
]
TOWER_COLUMNS = [*_beside_floor("vision tower ms a prompt", "time", "floor"), POINT_COLUMNS[-1]]
PER_PROMPT = ("prefill", "prefill_floor", "time", "floor")  # times of a batch, shown as those of a prompt

ANSWER_PARTS = ("host", "vision", "prefill", "decode", "other")
ANSWER_COLUMNS = [
    _column("answers/s", ".2f", "ahead"),
    _column("one thread", ".2f", "one_thread"),
    _column("prepared before", ".2f", "prepared"),
    _column("first token ms, median", ".1f", "first"),
    _column("99 %", ".1f", "first_99"),
    *(_part_column(part) for part in ANSWER_PARTS),
    _column("floor ms", ".2f", "floor"),
]

MIXED_COLUMNS = [
    Column[Row](key="name", header="", get=lambda row: row["name"]),
    Column[Row](key="sizes", header="sizes of the pictures", get=lambda row: row["sizes"]),
    _column("visual tokens", "d", "visual"),
    _column("vision ms", ".1f", "vision"),
    _column("prefill ms", ".1f", "prefill"),
    _column("first tokens ms", ".1f", "first"),
    _column("answers ms", ".1f", "answers"),
]

TARGET_COLUMNS: list[Column[Row]] = [
    Column(key="name", header="target", get=lambda row: row["name"]),
    Column(key="limit", header="limit", get=lambda row: f"{row['limit']:g}"),
    _column("measured", ".3f", "measured"),
    Column(key="met", header="", get=lambda row: "met" if row["met"] else "missed"),
]


def _table(columns: Sequence[Column[Row]], rows: Iterable[Row]) -> str:
    """Return rows in Markdown; a cell whose row lacks the column's key is empty."""
    cells = [[each.format(each.get(row)) if each.key in row else "" for each in columns] for row in rows]
    headers = [each.header for each in columns]
    text: str = MarkdownTableWriter(headers=headers, value_matrix=cells, margin=1).dumps()
    return text


def made_with(about: dict[str, Any]) -> str:
    """Return what a run was made on and with, in a line."""
    versions = f"torch {about['torch']}, transformers {about['transformers']}, commit {about['commit']}"
    return f"{about['device']}, {about['dtype']}, {versions}"


def tables(found: dict[str, Any]) -> str:
    """Return the tables of a run in Markdown: what was measured, and the targets with what was reached."""
    rows: list[Row] = list(found["rows"])
    for name, way in found["ways"].items():
        if way["free"] is not None:
            rows.append({"name": f"{name}, free method", "batch": 1, "graph": way["free"]})
        rows.append({"name": f"{name}, arithmetic floor", "batch": 1, "graph": way["floor"]})
    measured = _table([*_first_columns(found["about"]["visual"]), *SPEED_COLUMNS], rows)
    reached: list[Row] = [target._asdict() for target in targets(found)]
    return f"{measured}\n{_table(TARGET_COLUMNS, reached)}" if reached else measured


def answers_table(found: dict[str, Any]) -> str:
    """Return the table of `benchmarks.answers` in Markdown, and what it was made on and by which command."""
    about = found["about"]
    table = _table([*_first_columns(about["visual"]), *ANSWER_COLUMNS], found["rows"])
    return f"{table}\n{made_with(about)}\n\n`{about['command']}`\n"


def mixed_table(found: dict[str, Any]) -> str:
    """Return the table of `benchmarks.mixed` in Markdown, and what it was made on and by which command."""
    about = found["about"]
    return f"{_table(MIXED_COLUMNS, found['rows'])}\n{made_with(about)}\n\n`{about['command']}`\n"


def curve_table(found: dict[str, Any]) -> str:
    """Return the tables of `benchmarks.curves` in Markdown, and what they were made on and by which command."""
    about = found["about"]
    value = Column[Row](key="value", header=about["vary"], get=lambda row: f"{row['value']:g}")
    points, towers = ([_shown(row) for row in found[kind]] for kind in ("points", "towers"))
    name, batch, stages = _first_columns(about["visual"])
    where = [value] if about["vary"] == "batch" else [value, batch]
    parts = [_table([name, *where, stages, *POINT_COLUMNS], points)]
    parts += [_table([*where, *TOWER_COLUMNS], towers)] if towers else []
    parts += [f"{made_with(about)}, {about['new']} tokens an answer", f"`{about['command']}`\n"]
    return "\n\n".join(parts)


def _shown(row: Row) -> Row:
    """Return a point of a curve with what its row of the table shows."""
    measured = {key: value for key, value in row.items() if value is not None}
    each = {key: measured[key] / row["batch"] for key in PER_PROMPT if key in measured}
    note = row["failure"] or "; ".join(f"without a graph: {each}" for each in row.get("graphless", ()))
    stages = row.get("stages") or [row.get("visual", "")]
    names = {} if "way" not in row else {"name": row["way"]}
    return measured | each | names | {"note": note, "stages": stages}


def graph_decisions(rows: Iterable[Row]) -> str:
    """Return what the graph engine decided in each row, and why."""
    lines = []
    for row in rows:
        if row["graph_report"]:
            lines += [
                f"{row['name']}, batch {row['batch']}:",
                *(f"  {line}" for line in row["graph_report"].split("\n")),
            ]
    return "\n".join(["decisions of the graph engine:", *(lines or ["  none, as on a CPU, which has no CUDA graphs"])])


def scaling_table(about: dict[str, Any], rows: Sequence[Any]) -> str:
    """Return the table of `benchmarks.scaling` in Markdown, and what it was made on."""
    name, _, stages = _first_columns(about["visual"])
    kinds = list(rows[0].collectives)
    collectives = [_column(f"{kind} ms", ".2f", f"collectives {kind}") for kind in kinds]
    fields = [
        {**row._asdict(), **{f"collectives {kind}": spent for kind, spent in row.collectives.items()}} for row in rows
    ]
    table = _table([name, stages, *SCALING_COLUMNS, *collectives, *MEMORY_COLUMNS], fields)
    return f"{table}\n{about['processes']} processes, {made_with(about)}"


def picture(found: dict[str, Any], file: Path) -> None:
    """Draw the prefill's time against the visual tokens of the mean layer, with the floor, into a PNG."""
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    curve = sorted(found["ways"].values(), key=lambda way: way["visual_tokens"])
    tokens = [way["visual_tokens"] for way in curve]
    for key, label, style in (
        ("eager", "eager", "o--"),
        ("graph", "graph, fused", "o-"),
        ("floor", "arithmetic floor", ":"),
    ):
        axes.plot(tokens, [way[key] for way in curve], style, label=label)
    axes.set(xlabel="visual tokens in the mean layer", ylabel="prefill, ms", ylim=(0, None))
    axes.set_title(f"{found['about']['backbone']}, {found['about']['device']}")
    axes.legend()
    figure.savefig(file, dpi=150)


def serving_table(rows: Iterable[Row]) -> str:
    """Return the table of `benchmarks.serving` in Markdown."""
    rows = list(rows)
    return _table([each for each in SERVING_COLUMNS if each.key in rows[0]], rows)
