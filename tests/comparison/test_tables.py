"""Tables: their numbers are those of the runs, and no text breaks them."""

import csv
import io
import re

import pytest

from comparison import tables
from comparison.intervals import interval, paired_interval
from comparison.published import Published
from comparison.runs import pooled
from comparison.significance import holm, p_value

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
    random = run("random", 192, 0.6).scores
    worst, best = paired_interval(scores, random)
    p = p_value(scores, (random,))
    tokens = (2 * 576 + 2 * 192 + 2 * 96) / 6
    total = 3.1e9 + 1e7 * tokens + 4e7 + 2.5e7
    assert list(clse.values()) == [
        "clse 192",
        "0.880",
        f"{low:.3f} to {high:.3f}",
        f"{100 * 0.88 / 0.9:.1f}",
        f"-0.020 ({below:+.3f} to {above:+.3f})",
        f"+0.280 ({worst:+.3f} to {best:+.3f})",
        f"yes, p = {p:.4f}",
        "192/96",
        f"{tokens:.1f}",
        f"{total / 1e9:.3f}",
        f"{100 * 4e7 / total:.2f}",
        "8.125",
        "1,234,663",
        "0.125",
    ]
    assert rows["unpruned"]["difference to unpruned"] == "-"
    assert rows["unpruned"]["better than random?"] == rows["random 192"]["better than random?"] == "-"
    assert rows["clse 64"]["better than random?"] == "-", "no random tokens at this budget"
    assert rows["unpruned"]["visual tokens kept"] == "576"
    assert rows["unpruned"]["% of unpruned"] == "100.0"
    assert set(list(rows["fastv 9000"].values())[1:]) == {"-"}
    assert notes == [
        "",
        f"Questions a run: {len(scores)}.",
        "",
        "- fastv 9000: a budget of 9000 is more than 576 visual tokens",
    ]


def test_seeds_are_one_row_with_their_deviation(runs, run):
    draws = [run("random", 64, accuracy) for accuracy in (0.5, 0.6, 0.7)]
    pooled_runs = pooled([run(), run("clse", 64, 0.8), run("pool", 64, 0.55), *draws])
    rows, _ = parsed(tables.markdown(pooled_runs))
    assert list(rows) == ["unpruned", "clse 64", "pool 64", "random 64"]
    assert rows["random 64"]["accuracy"] == "0.600"
    assert rows["random 64"]["standard deviation over seeds"] == "0.1000"
    assert rows["clse 64"]["standard deviation over seeds"] == "-"
    values = [p_value(run(accuracy=accuracy).scores, tuple(each.scores for each in draws)) for accuracy in (0.8, 0.55)]
    better, worse = holm(values)
    assert rows["clse 64"]["better than random?"] == f"yes, p = {better:.4f}"
    assert rows["pool 64"]["better than random?"] == f"not shown, p = {worse:.4f}"
    read = {row["strategy"]: row for row in csv.DictReader(io.StringIO(tables.csv(pooled_runs)))}
    assert (read["random"]["seeds"], read["clse"]["seeds"]) == ("3", "1")
    assert float(read["clse"]["p_better_than_random"]) == better
    assert "standard deviation over seeds" not in tables.table(runs)[0]


def test_published_figures_have_a_column_of_their_own(runs):
    figures = {"clse 64": Published(97.25, "arXiv 1234.5678")}
    headers, cells = tables.table(runs, figures)
    column = headers.index("published % of unpruned")
    assert [row[column] for row in cells] == ["-", "-", "97.2 (arXiv 1234.5678)", "-", "-"]
    assert [row[:column] for row in cells] == [row[:column] for row in tables.table(runs)[1]]
    read = list(csv.DictReader(io.StringIO(tables.csv(runs, figures))))
    assert [row["published_percent_of_unpruned"] for row in read] == ["", "", "97.25", "", ""]
    assert "published % of unpruned" not in tables.table(runs)[0]


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
    assert len(notes) == 4
    assert "<script" not in text
    assert "\\" not in text, "a backslash before a | would end the cell"
    assert "&#60;script>" in notes[3]


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
