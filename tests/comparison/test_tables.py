"""Tables: their numbers are those of the runs, and no text breaks them."""

import csv
import io
import re

import pytest

from comparison import tables
from comparison.intervals import interval, paired_interval

HOSTILE = '<script>alert("1")</script> a|b \\| c\nd \r\n### e \U0001f600'


def parsed(text):
    """The cells of a Markdown table, by run and header, and the lines after it."""
    lines = text.splitlines()
    cells = [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines if line.startswith("|")]
    headers = cells[0]
    assert all(len(row) == len(headers) for row in cells)
    return {row[0]: dict(zip(headers, row, strict=True)) for row in cells[2:]}, [x for x in lines if x[:1] != "|"]


def test_numbers_are_those_of_the_runs(runs, run):
    rows, notes = parsed(tables.markdown(runs))
    assert list(rows) == ["unpruned", "clse 192", "clse 64", "fastv 9000", "random 192"]
    clse, scores = rows["clse 192"], run("clse", 192, 0.88).scores
    low, high = interval(scores)
    below, above = paired_interval(scores, run().scores)
    tokens = (2 * 576 + 2 * 192 + 2 * 96) / 6
    total = 3.1e9 + 1e7 * tokens + 4e7 + 2.5e7
    assert list(clse.values()) == [
        "clse 192",
        "0.880",
        f"{low:.3f} to {high:.3f}",
        f"{100 * 0.88 / 0.9:.1f}",
        f"-0.020 ({below:+.3f} to {above:+.3f})",
        "192/96",
        f"{tokens:.1f}",
        f"{total / 1e9:.3f}",
        f"{100 * 4e7 / total:.2f}",
        "8.125",
        "1,234,663",
        "0.125",
    ]
    assert rows["unpruned"]["difference to unpruned"] == "-"
    assert rows["unpruned"]["visual tokens kept"] == "576"
    assert rows["unpruned"]["% of unpruned"] == "100.0"
    assert set(list(rows["fastv 9000"].values())[1:]) == {"-"}
    assert notes == ["", "- fastv 9000: a budget of 9000 is more than 576 visual tokens"]


def test_one_unit_a_column(runs, run):
    headers, _ = tables.table(runs)
    assert "prefill, G multiply-adds" in headers
    assert "a decoded token, M multiply-adds" in headers
    large = run("large", 192)
    large.record["multiply_adds"].update(prefill=2e12, decode=7e9)
    headers, rows = tables.table([*runs, large])
    assert "a decoded token, G multiply-adds" in headers
    column = headers.index("prefill, T multiply-adds")
    assert [row[column] for row in rows] == ["0.009", "0.006", "0.005", "-", "0.006", "2.003"]


@pytest.mark.parametrize(
    ("values", "letter"), [([], "M"), ([5.0], "M"), ([9e8, 1e9], "G"), ([float("nan"), 1e12], "T")]
)
def test_units(values, letter):
    assert tables.unit(values)[1] == letter


def test_an_unpruned_accuracy_of_zero_is_no_division(run):
    rows, _ = parsed(tables.markdown([run(accuracy=0), run("clse", 192, 0.1)]))
    assert [row["% of unpruned"] for row in rows.values()] == ["-", "-"]
    assert rows["clse 192"]["difference to unpruned"].startswith("+0.100 (")


def test_without_an_unpruned_run_nothing_is_compared(run, failed):
    for others in ([], [failed("unpruned", None)]):
        rows, _ = parsed(tables.markdown([*others, run("clse", 192)]))
        assert rows["clse 192"]["accuracy"] == "0.900"
        assert {rows["clse 192"][name] for name in ("% of unpruned", "difference to unpruned")} == {"-"}


def test_a_metric_that_is_no_mean_has_no_interval(run):
    summed = {"scores": (), "metric": "mme score"}
    made = [run(accuracy=0.8, **summed), run("clse", 192, 0.6, **summed)]
    rows, _ = parsed(tables.markdown(made))
    assert rows["clse 192"]["95 % interval"] == "-"
    assert rows["clse 192"]["difference to unpruned"] == "-0.200"
    assert rows["clse 192"]["accuracy (mme score)"] == "0.600"


def test_all_runs_failed(failed):
    rows, notes = parsed(tables.markdown([failed(), failed("clse", 1)]))
    assert len(rows) == 2
    assert len(notes) == 3
    assert len(list(csv.DictReader(io.StringIO(tables.csv([failed()]))))) == 1
    assert tables.table([])[1] == []


def test_hostile_text_breaks_no_line(run, failed):
    text = tables.markdown([run(metric=HOSTILE), run(HOSTILE, 192, metric=HOSTILE), failed(reason=HOSTILE)])
    rows, notes = parsed(text)
    assert len(rows) == 3
    assert len(notes) == 2
    assert "<script" not in text
    assert "\\" not in text, "a backslash before a | would end the cell"
    assert "&#60;script>" in notes[1]


def test_csv_holds_the_raw_numbers(runs, run):
    runs[0] = run("clse", 192, 0.88, strange := {1: 300, 2: 192, 5: 7})
    read = {row["strategy"] + row["budget"]: row for row in csv.DictReader(io.StringIO(tables.csv(runs)))}
    assert list(read) == ["unpruned", "clse192", "clse64", "fastv9000", "random192"]
    row, made = read["clse192"], runs[0]
    assert float(row["accuracy"]) == made.accuracy
    assert (float(row["accuracy_low"]), float(row["accuracy_high"])) == interval(made.scores)
    pair = paired_interval(made.scores, run().scores)
    assert (float(row["difference_low"]), float(row["difference_high"])) == pair
    assert [float(row[f"kept_tokens_{i}"]) for i in (1, 2, 3)] == list(strange.values())
    assert [float(row[f"tokens_by_layer_{i}"]) for i in range(1, 7)] == made.record["tokens_by_layer"]
    parts = made.record["multiply_adds"]
    assert {part: float(row[f"multiply_adds_{part}"]) for part in parts} == parts
    assert float(row["multiply_adds_total"]) == made.operations
    assert float(row["seconds_vision"]) == 0.02
    assert float(row["cache_bytes"]) == made.record["cache_bytes"]
    assert read["clse64"]["kept_tokens_3"] == read["unpruned"]["difference"] == read["unpruned"]["budget"] == ""
    assert read["fastv9000"]["accuracy"] == ""
    assert read["fastv9000"]["failed"] == "a budget of 9000 is more than 576 visual tokens"
    assert row["failed"] == ""


def test_csv_keeps_hostile_text(run):
    (row,) = csv.DictReader(io.StringIO(tables.csv([run(HOSTILE, 1)]), newline=""))
    assert row["strategy"] == HOSTILE
