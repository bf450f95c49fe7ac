"""The page and the picture of the architecture: all that they name exists, and the picture is what its script draws."""

import ast
import re
import runpy
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs/architecture.md"
CODE = [
    file
    for folder in ("strategy", "comparison", "video/Video-LLaVA", "serving/vllm/vllm_vtr")
    for file in (ROOT / folder).rglob("*.py")
]


def defined() -> set[str]:
    """Return the names of modules, constants, classes and functions, and Class.name or module.name for functions."""
    names = {file.stem for file in CODE}
    for file in CODE:
        tree = ast.parse(file.read_text())
        targets = [each for node in tree.body for each in getattr(node, "targets", [getattr(node, "target", None)])]
        names |= {each.id for each in targets if isinstance(each, ast.Name)}
        for node in ast.walk(tree):
            if isinstance(node, ast.ClassDef | ast.FunctionDef):
                names.add(node.name)
            if isinstance(node, ast.ClassDef | ast.Module):
                owner = file.stem if node is tree else node.name
                names |= {f"{owner}.{each.name}" for each in node.body if isinstance(each, ast.FunctionDef)}
                names |= {f"{owner}.{each.target.id}" for each in node.body if isinstance(each, ast.AnnAssign)}
    return names


NAMES = defined()
DRAWN = runpy.run_path(str(ROOT / "docs/make_architecture.py"))


@pytest.mark.parametrize("name", sorted(set(re.findall(r"`([A-Za-z]\w*(?:\.\w+)?)`", PAGE.read_text()))))
def test_what_the_page_names_exists(name):
    outside = {"generate", "attention", "strategy.graph"}  # transformers' method, a closure, a logger
    assert name in NAMES | outside


def test_what_a_row_names_is_in_the_files_that_the_row_links():
    rows = PAGE.read_text().partition("## I want to change")[2].splitlines()
    pairs = re.findall(r"\]\(\.\./(\S+\.py)\)((?: `[\w.]+`(?:,| and)?)+)", "\n".join(rows))
    assert len(pairs) > 15
    for path, names in pairs:
        source = (ROOT / path).read_text()
        for name in re.findall(r"`(?:\w+\.)?(\w+)`", names):
            assert re.search(rf"^\s*(?:def|class) {name}\b", source, re.MULTILINE), f"{path}: {name}"


def test_the_page_links_to_what_exists():
    links = re.findall(r"\]\(([^)#]+)\)", PAGE.read_text())
    assert len(links) > 30
    assert not [link for link in links if not (PAGE.parent / link).exists()]


def test_the_picture_is_what_its_script_draws():
    assert DRAWN["PICTURE"].read_text() == DRAWN["picture"]()


def test_the_picture_shows_every_room_and_method():
    rooms = {folder.name for folder in (ROOT / "strategy").iterdir() if (folder / "__init__.py").exists()}
    drawn = " ".join(name for name, *_ in DRAWN["ROOMS"])
    assert rooms <= set(re.findall(r"(\w+)/", drawn))
    files = {file.stem for file in (ROOT / "strategy").glob("*.py") if "@register(" in file.read_text()}
    assert files == set(DRAWN["METHODS"]), "change METHODS in docs/make_architecture.py, and run it"


def test_the_methods_stand_inside_their_box():
    svg = PAGE.with_name("architecture.svg").read_text()
    ends = [
        tuple(map(float, found))
        for found in re.findall(r'<rect x="([\d.]+)" y="([\d.]+)" width="([\d.]+)" height="([\d.]+)"', svg)
    ]
    (_, head) = map(float, re.search(r'<text x="([\d.]+)" y="([\d.]+)"[^>]*>methods<', svg).groups())
    [(left, top, width, height)] = [each for each in ends if each[1] == head - 21 and each[2] < 200]
    for name in DRAWN["METHODS"]:
        x, y = map(float, re.search(rf'<text x="([\d.]+)" y="([\d.]+)"[^>]*>{name}<', svg).groups())
        assert left < x < x + 6 * len(name) < left + width + 6, name  # at most six units a letter of size 10
        assert head < y < top + height, name


def test_the_steps_of_the_picture_exist():
    steps = [drawn for row in DRAWN["STEPS"] for drawn in row if drawn and drawn[1] != "stock"]
    for name, _, about in steps:
        code = [
            word
            for word in re.findall(r"\w+(?:\.\w+)?", f"{name} {about}")
            if "_" in word or re.search("[a-z][A-Z]|[.]", word)
        ]
        assert name.split(",")[0].split(".")[0] in NAMES
        assert not [word for word in code if word not in NAMES], about
