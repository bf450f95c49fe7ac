"""Columns: one entry is a column of the Markdown table, the CSV and the report."""

import csv
import io

import pytest

from comparison import tables
from comparison.columns import COLUMNS, Column, number
from comparison.report import write


@pytest.fixture
def extra(monkeypatch):
    """A column that one entry adds."""
    column = Column(
        key="answers_per_second",
        header="answers per second",
        unit="{prefix} answers",
        format=number(".1f"),
        get=lambda row: 1e9 / row.run.seconds,
    )
    monkeypatch.setattr(tables, "COLUMNS", [*COLUMNS, column])
    return column


def test_one_entry_is_a_column_everywhere(extra, runs, tmp_path):
    headers, rows = tables.table(runs)
    assert headers[-1] == "answers per second, G answers"
    assert [row[-1] for row in rows] == ["8.0", "8.0", "8.0", "-", "8.0"]
    assert "answers per second, G answers" in tables.markdown(runs).splitlines()[0]
    found = list(csv.DictReader(io.StringIO(tables.csv(runs))))
    assert [row["answers_per_second"] for row in found] == ["8000000000.0"] * 3 + ["", "8000000000.0"]
    write(runs, [], {}, tmp_path / "report.html")
    assert '<th scope="col">answers per second, G answers</th>' in (tmp_path / "report.html").read_text()


def test_keys_and_headers_are_those_that_readers_of_older_files_know(runs):
    names = next(csv.reader(io.StringIO(tables.csv(runs))))
    assert names[:23] == [
        *("strategy", "budget", "task", "metric", "questions", "accuracy", "accuracy_low", "accuracy_high"),
        *("percent_of_unpruned", "difference", "difference_low", "difference_high"),
        *("difference_to_random", "difference_to_random_low", "difference_to_random_high"),
        *("p_better_than_random", "accuracy_deviation", "seeds"),
        *("published_percent_of_unpruned", "published_source"),
        *("seconds", "multiply_adds_total", "scoring_percent"),
    ]
    assert names[-5:] == ["seconds_vision", "seconds_prefill", "seconds_scoring", "seconds_decode", "failed"]
    assert len(set(names)) == len(names)
    assert tables.table(runs)[0] == [
        *("run", "accuracy", "95 % interval", "% of unpruned", "difference to unpruned", "difference to random"),
        *("better than random?", "visual tokens kept"),
        *("mean visual tokens per layer", "prefill, G multiply-adds", "of it scoring, %"),
        *("a decoded token, M multiply-adds", "KV bytes", "seconds a question"),
    ]
