"""The report: one well-formed file, which asks for nothing and runs nothing."""

import base64
import math
import re
from html.parser import HTMLParser

import pytest

from comparison import tables
from comparison.report import Example, write

PNG = base64.b64decode(
    "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="
)
HOSTILE = "<script>alert('1')</script> \"><img src=x onerror=alert(1)> {{ 7 * 7 }} &amp; $\\frac$ \U0001f600 \ud800"
VOID = {"meta", "link", "img", "br", "hr", "input"}
NAMESPACES = {"http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"}


class Page(HTMLParser):
    """The tags of a page, checked to be balanced, and its text."""

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.text = [], [], []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append((self.open[-1] if self.open else "", data))

    def attributes(self, name):
        return [attributes[name] for _, attributes in self.tags if name in attributes]

    def inside(self, *tags):
        return [data for tag, data in self.text if tag in tags]

    def count(self, tag):
        return sum(name == tag for name, _ in self.tags)


def example(right=True, **changes):
    fields = {"question": "Is it red?", "target": "yes", "unpruned": "yes", "pruned": "yes" if right else "no"}
    return Example(**fields | {"strategy": "clse", "budget": 64, "right": right, "picture": PNG} | changes)


@pytest.fixture
def page(tmp_path):
    """The maker of a report, read again."""

    def make(runs, examples=(), about=()):
        write(runs, examples, dict(about), tmp_path / "report.html")
        return Page((tmp_path / "report.html").read_text())

    return make


def test_the_table_is_the_tables(page, runs):
    headers, rows = tables.table(runs)
    made = page(runs)
    assert made.inside("td") == [cell for row in rows for cell in row[1:]]
    assert made.inside("th") == headers + [row[0] for row in rows]
    scopes = [attributes.get("scope") for tag, attributes in made.tags if tag == "th"]
    assert scopes == ["col"] * len(headers) + ["row"] * len(rows)
    assert ": a budget of 9000 is more than 576 visual tokens" in made.inside("li")


def test_it_asks_for_nothing(page, runs):
    made = page(runs, [example(), example(False)], {"model": "llava_vtr"})
    for tag, attributes in made.tags:
        assert tag not in {"script", "iframe", "object", "embed", "base", "form"}
        for name, value in attributes.items():
            assert not re.search(r"https?:|//[a-z]", value or "") or (name[:5] == "xmlns" and value in NAMESPACES)
            assert not name.startswith("on")
            if name in {"src", "href", "xlink:href", "srcset", "data", "action"}:
                assert value.startswith(("data:", "#"))
    assert not any(re.search(r"https?:|@import|url\((?!#)", style) for style in made.inside("style"))
    assert "default-src 'none'" in " ".join(made.attributes("content"))


def test_ids_are_unique_and_references_lead_to_them(page, runs):
    made = page(runs, [example(), example(False)])
    ids = made.attributes("id")
    assert len(ids) == len(set(ids))
    wanted = [value[1:] for value in made.attributes("xlink:href")] + made.attributes("aria-labelledby")
    wanted += [name for value in made.attributes("clip-path") for name in re.findall(r"url\(#(.*)\)", value)]
    assert wanted
    assert set(wanted) <= set(ids)


def test_figures_name_every_strategy_and_say_what_they_are(page, runs):
    made = page(runs)
    drawings = [attributes for tag, attributes in made.tags if tag == "svg"]
    assert [drawing["role"] for drawing in drawings] == ["img"] * 3
    assert all(drawing["aria-label"] and "width" not in drawing and drawing["viewbox"] for drawing in drawings)
    words = made.inside("text")
    assert {"unpruned", "clse", "random", "clse 192", "clse 64", "random 192", "scoring"} <= set(words)
    assert words.count("clse 64") == 1, "in the bars only: 192 is the budget that most have"
    assert "fastv" not in words, "it has no run"


def test_examples_are_grouped_and_carry_their_picture(page, runs):
    made = page(runs, [example(False, question="Wrong?"), example(question="Right?")])
    assert made.inside("h2")[-2:] == ["What pruning got right", "What pruning got wrong"]
    assert made.inside("h3")[-2:] == ["Right?", "Wrong?"]
    pictures = [attributes for tag, attributes in made.tags if tag == "img"]
    assert [base64.b64decode(picture["src"].split(",")[1]) for picture in pictures] == [PNG, PNG]
    assert pictures[0]["alt"].endswith("Right?")
    assert "What pruning got wrong" not in page(runs, [example()]).inside("h2")


def test_what_the_graph_engine_decided_is_listed_for_each_run(page, run):
    report = "2 x answer: stock loop (the model is <trained>)\n1 x prefill: stock prefill (no picture)"
    made = page([run(), run("clse", 192, graph_report=report)])
    assert made.inside("h2")[-1] == "Decisions of the graph engine"
    assert made.inside("h3") == ["clse 192"]
    assert made.inside("li") == report.splitlines()
    assert "Decisions of the graph engine" not in page([run()]).inside("h2")


def test_the_page_says_what_its_columns_mean(page, run):
    text = " ".join(page([run(), run("clse", 64), run("random", 64, 0.5)]).inside("p"))
    assert "adjusted for their number by Holm's method" in text
    assert "paper" not in text
    assert "random" not in " ".join(page([run(), run("clse", 64)]).inside("p"))


def test_facts_come_in_order(page, runs):
    made = page(runs, about={"model": "llava_vtr", "commit": "0123"})
    assert (made.inside("dt"), made.inside("dd")) == (["model", "commit"], ["llava_vtr", "0123"])


@pytest.mark.filterwarnings("ignore:Glyph")
def test_hostile_text_is_text(page, run, failed):
    name = HOSTILE.rstrip(" \ud800")  # names are Python's, half a surrogate pair comes from models and data sets only
    words = dict.fromkeys(("question", "target", "unpruned", "pruned"), HOSTILE)
    runs = [run(metric=HOSTILE), run(name, 192, metric=HOSTILE), failed(name, reason=HOSTILE)]
    made = page(runs, [example(**words, strategy=name)], {HOSTILE: HOSTILE})
    shown = HOSTILE.replace("\ud800", "?")
    assert made.count("script") == 0
    assert made.count("img") == 1
    assert shown in made.inside("h3")
    assert made.inside("dd").count(shown) == 4
    assert f"{name} 192" in made.inside("th")
    assert f": {shown}" in made.inside("li")
    assert name in made.inside("text")


def test_the_same_runs_give_the_same_file(runs, tmp_path):
    for name in ("one", "two"):
        write(runs, [example()], {"model": "m"}, tmp_path / name)
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()


def test_few_runs(page, run, failed):
    assert page([failed(), failed("clse", 1)]).count("svg") == 0
    assert page([]).count("svg") == 0
    assert page([run()]).count("svg") == 3
    assert page([run("clse", 192)]).count("svg") == 3, "no unpruned run"
    assert page([failed("unpruned", None), run("clse", 192, scores=())]).count("svg") == 3


@pytest.mark.filterwarnings("error")
def test_many_strategies_and_a_number_that_is_none(page, run):
    many = [run(), *(run(f"strategy{i}", 64, 0.5) for i in range(30)), run("lost", 64, 0.5, seconds=math.nan)]
    assert page(many).inside("text").count("strategy29 64") == 2


def test_an_old_report_survives_an_error(runs, tmp_path):
    path = tmp_path / "report.html"
    path.write_text("old")
    with pytest.raises(TypeError):
        write(runs, [example(picture=None)], {}, path)
    assert path.read_text() == "old"
