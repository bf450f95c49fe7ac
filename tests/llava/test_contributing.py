"""What contributors and people who cite the project read: versions agree, and what is named exists."""

import ast
import os
import re
import shutil
import subprocess
import sys

import pytest
import tomllib
import yaml
from documents import ROOT, blocks

from comparison import compare, look

PROJECTS = [file for depth in ("", "*/", "*/*/") for file in sorted(ROOT.glob(f"{depth}pyproject.toml"))]
FORMS = sorted((ROOT / ".github/ISSUE_TEMPLATE").glob("*.yml"))


def test_all_packages_have_the_version_of_the_changelog_and_the_citation():
    versions = {tomllib.loads(file.read_text())["project"]["version"] for file in PROJECTS}
    [(version, date)] = re.findall(r"^## \[([\d.]+)\] - (\S+)$", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)[:1]
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert len(PROJECTS) > 6
    assert versions == {version, citation["version"]}
    assert date == str(citation["date-released"])


def test_the_citation_names_the_papers_of_all_methods():
    numbers = {
        number
        for file in (ROOT / "strategy").glob("*.py")
        for number in re.findall(r"arXiv (\d{4}\.\d{5})", file.read_text())
    }
    references = yaml.safe_load((ROOT / "CITATION.cff").read_text())["references"]
    cited = {each["value"].removeprefix("arXiv:") for work in references for each in work["identifiers"]}
    assert len(numbers) > 5
    assert cited == numbers


@pytest.mark.parametrize("file", PROJECTS, ids=lambda file: file.parent.name)
def test_every_package_is_typed_and_says_so(file):
    wheel = tomllib.loads(file.read_text())["tool"]["hatch"]["build"]["targets"]["wheel"]
    for package in wheel.get("packages", ["."]):
        assert (file.parent / package / "py.typed").is_file()
    assert "packages" in wheel or "py.typed" in wheel["include"]


@pytest.mark.parametrize("form", FORMS, ids=lambda form: form.stem)
def test_issue_forms_are_what_github_takes(form):
    given = yaml.safe_load(form.read_text())
    assert {"name", "description", "body"} <= set(given)
    names = [part["id"] for part in given["body"]]
    assert len(set(names)) == len(names) > 3
    for part in given["body"]:
        assert part["type"] in ("input", "textarea", "dropdown", "checkboxes")
        assert part["attributes"]["label"]
        assert bool(part["attributes"].get("options")) == (part["type"] in ("dropdown", "checkboxes"))


def test_there_is_a_form_for_a_bug_a_method_and_a_model():
    assert [form.stem for form in FORMS] == ["bug", "new_method", "new_model"]


def test_the_workflow_runs_what_ci_runs():
    workflow = yaml.safe_load((ROOT / ".github/workflows/ci.yml").read_text())
    steps = workflow["jobs"]["test"]["steps"]
    assert [step["run"] for step in steps if "run" in step] == [".ci/run"]
    assert (ROOT / ".ci/run").stat().st_mode & 0o111
    assert [step["with"]["python-version"] for step in steps if "with" in step] == ["3.11"]


def test_contributors_are_told_sessions_that_exist_and_files_that_are_there():
    guide, noxfile = (ROOT / "CONTRIBUTING.md").read_text(), (ROOT / "noxfile.py").read_text()
    pairs = re.findall(r"^def (\w+)\(session|^    \"(\w+)\": Backbone", noxfile, re.MULTILINE)
    named = set(re.findall(r"nox -s (\w+)", guide))
    assert len(named) > 3
    assert named <= {name for pair in pairs for name in pair}
    links = [
        target
        for name in ("CONTRIBUTING.md", "CHANGELOG.md")
        for target in re.findall(r"\]\(([^)#:]+)\)", (ROOT / name).read_text())
    ]
    assert len(links) > 8
    assert not [target for target in links if not (ROOT / target).exists()]


def documented_strategies():
    """The files of strategies that are documented, by the names that they register."""
    own = [block for document, block in blocks("python") if document.name == "adding_a_strategy.md"]
    return {re.findall(r'^@register\("(\w+)"\)$', block, re.MULTILINE)[0]: block for block in own}


def test_documented_strategies_keep_the_rules_of_the_house(tmp_path):
    examples = documented_strategies()
    assert set(examples) == {"change", "attention", "spread"}
    for folder in ("strategy", "tests/strategy"):
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    for name, block in examples.items():
        (tmp_path / f"strategy/{name}.py").write_text(block)
        tree = ast.parse(block)
        lacking = [node.name for node in tree.body if isinstance(node, ast.ClassDef) and not ast.get_docstring(node)]
        assert ast.get_docstring(tree), f"{name}: the module has no docstring, as ruff wants one"
        assert not lacking
    command = [sys.executable, "-m", "pytest", "tests/strategy/test_house.py", "-p", "no:cacheprovider"]
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


def test_no_option_may_be_called_as_a_flag_that_the_guide_names(monkeypatch):
    [sentence] = re.findall(
        r"as a flag of its own: (.*?); nor, because of `look`, (.*?)\.",
        (ROOT / "docs/adding_a_strategy.md").read_text().replace("\n", " "),
    )
    named = [set(re.findall(r"\w+", part)) - {"or"} for part in sentence]
    model = ["--model", "m", "--pretrained", "p"]
    monkeypatch.setattr("comparison.cli.describe_options", dict)
    own = compare.parse([*model, "--strategies", "clse", "--budgets", "64", "--tasks", "t"])
    assert set(vars(own)) == named[0]
    seen = look.parse([*model, "--image", "i", "--question", "q"])
    assert set(vars(seen)) - set(vars(own)) == named[1]
