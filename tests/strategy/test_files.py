"""Files that are written in full or not at all."""

import os

import pytest

from strategy.evaluation.files import write_whole


def test_missing_folders_are_made_and_an_old_file_is_replaced(tmp_path):
    file = tmp_path / "folder" / "file"
    for content in (b"a longer text", b"short"):
        write_whole(file, content)
        assert file.read_bytes() == content
    assert os.listdir(file.parent) == ["file"]


@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_an_error_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch, step):
    file = tmp_path / "file"
    write_whole(file, b"old")

    def fail(*_):
        raise OSError("disk full")

    with monkeypatch.context() as patch:
        patch.setattr(os, step, fail)
        with pytest.raises(OSError, match="disk full"):
            write_whole(file, b"new")
    assert file.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["file"]
