"""The digest: any code that makes answers changes it, and nothing else does."""

import importlib.metadata
import shutil
import sys
from pathlib import Path

import pytest
from PIL import Image

import strategy
from strategy.evaluation import digest
from strategy.evaluation.digest import packages_with

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


def of_folder():
    return digest.of_code(["some_vtr"])


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


def test_changed_data_changes_the_digest(tmp_path):
    weights, tasks = tmp_path / "weights", tmp_path / "tasks"
    (weights / "tower").mkdir(parents=True)
    (tasks / "deep").mkdir(parents=True)

    def digests():
        return digest.of_weights([weights, None, "owner/name"]), digest.of_tasks([tasks, None])

    found = [digests()]
    for file in ("model.safetensors", "config.json", "tower/pytorch_model.bin"):
        (weights / file).write_text("one")
        found.append(digests())
    for file in ("questions.parquet", "deep/task.yaml", "deep/utils.py"):
        (tasks / file).write_text("one")
        found.append(digests())
    assert [len(set(each)) for each in zip(*found, strict=True)] == [4, 4]


def test_the_last_byte_of_the_weights_counts(tmp_path, monkeypatch):
    monkeypatch.setattr(digest, "CHUNK", 8)
    (tmp_path / "model.safetensors").write_bytes(bytes(99))
    before = digest.of_weights([tmp_path])
    assert digest.of_weights([tmp_path]) == before
    (tmp_path / "model.safetensors").write_bytes(bytes(98) + b"1")
    assert digest.of_weights([tmp_path]) != before


def test_versions_are_those_of_installed_libraries():
    versions = digest.of_versions()
    assert versions["torch"] == importlib.metadata.version("torch")
    assert None not in versions.values()


def picture(value=0, mode="RGB"):
    return Image.new(mode, (2, 2), value)


def test_each_part_of_a_value_counts(tmp_path):
    (tmp_path / "clip.mp4").write_bytes(b"one")
    values = [
        *([picture()], [picture(1)], [picture(mode="L")], picture(), [picture()] * 2, [[picture()], picture()]),
        *({"image": "a"}, {"image": "b"}, ["image", "a"], "a", 1, "1", [1, 2], [12], None, []),
        str(tmp_path / "clip.mp4"),
    ]
    digests = list(map(digest.of_value, values))
    assert len(set(digests)) == len(values)
    (tmp_path / "clip.mp4").write_bytes(b"two")
    again = list(map(digest.of_value, values))
    assert [before == after for before, after in zip(digests, again, strict=True)] == [True] * (len(values) - 1) + [
        False
    ]
