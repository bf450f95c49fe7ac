"""The digest: any code that makes answers changes it, and nothing else does."""

import shutil
import sys
from pathlib import Path

import pytest

import strategy
from comparison import digest as module
from comparison.digest import digest, packages_with

BACKBONE = {
    "some_vtr/__init__.py": "import torch\nfrom some_shared import hooks\n",
    "some_vtr/model/layers.py": "import strategy.backbone\nfrom . import towers\n",
    "some_vtr/model/towers.py": "import unwritten\nWIDTH = 1\n",
    "some_shared/__init__.py": "",
    "some_shared/hooks.py": "from some_vtr import model\n",
    "unrelated/__init__.py": "",
}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder of packages: a copy of `strategy`, and a backbone that builds upon another package."""
    for name, text in BACKBONE.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    skip = shutil.ignore_patterns("__pycache__")
    shutil.copytree(Path(strategy.__file__).parent, tmp_path / "strategy", ignore=skip)
    monkeypatch.syspath_prepend(tmp_path)
    # Otherwise the imported package would be found in its place.
    monkeypatch.delitem(sys.modules, "strategy")
    return tmp_path


def of_folder(data=()):
    return digest(["some_vtr"], data)


def test_a_backbone_comes_with_the_packages_that_it_builds_upon(folder):
    assert packages_with(["some_vtr"]) == {name: folder / name for name in ("some_shared", "some_vtr", "strategy")}


@pytest.mark.parametrize(
    "name", ["strategy/kernels/attention.py", "strategy/clse.py", "some_vtr/model/towers.py", "some_shared/hooks.py"]
)
def test_changed_code_changes_the_digest(folder, name):
    before = of_folder()
    assert of_folder() == before
    with (folder / name).open("a") as file:
        file.write("# changed\n")
    assert of_folder() != before


def test_new_and_moved_code_changes_the_digest(folder):
    digests = [of_folder()]
    (folder / "strategy/kernels/new.py").write_text("")
    digests.append(of_folder())
    (folder / "strategy/kernels/new.py").rename(folder / "strategy/pruning/new.py")
    digests.append(of_folder())
    assert len(set(digests)) == 3


@pytest.mark.parametrize(
    "name", ["strategy/kernels/__pycache__/x.cpython-311.pyc", "strategy/README.md", "unrelated/__init__.py"]
)
def test_what_makes_no_answers_does_not_change_the_digest(folder, name):
    before = of_folder()
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).write_text("changed")
    assert of_folder() == before


def test_a_broken_strategy_does_not_stop_the_digest(folder):
    before = of_folder()
    (folder / "strategy/broken.py").write_text("def (")
    assert of_folder() != before


def test_changed_data_changes_the_digest(tmp_path, monkeypatch):
    weights, tasks = tmp_path / "weights", tmp_path / "tasks"
    (tasks / "deep").mkdir(parents=True)
    weights.mkdir()
    digests = [digest([], [weights, tasks, None])]
    for file in (weights / "model.safetensors", tasks / "deep/task.yaml", tasks / "deep/utils.py"):
        for text in ("one", "two"):
            file.write_text(text)
            digests.append(digest([], [weights, tasks, None]))
    monkeypatch.setattr(module, "_version", lambda name: "0")
    digests.append(digest([], [weights, tasks, None]))
    assert len(set(digests)) == len(digests)
