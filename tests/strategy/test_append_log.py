"""A log that a kill cuts off at any byte, a disk that is full, and a lock that another process holds."""

import json
import os
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from strategy.evaluation.append_log import AppendOnlyLog, acquire_lock, read_log

# Answers hold whatever a model says: line ends of every alphabet, halves of characters, quotes.
TEXTS = st.text(st.characters(codec=None, categories=None), max_size=6)
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | TEXTS,
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(TEXTS, inner, max_size=2),
    max_leaves=4,
)
BATCHES = st.lists(st.lists(VALUES, max_size=3), max_size=4)


def same(value):
    return value


def append(file, batches):
    """Append batches of values and return how long the file was after each."""
    log = AppendOnlyLog(file, same)
    sizes = []
    for batch in batches:
        log.append(batch)
        sizes.append(file.stat().st_size)
    log.close()
    return log.values, sizes


@given(before=BATCHES, after=BATCHES, data=st.data())
def test_a_kill_at_any_byte_loses_only_the_line_that_was_being_written(tmp_path_factory, before, after, data):
    file = tmp_path_factory.mktemp("log") / "log.jsonl"
    opened, sizes = append(file, before)
    assert opened == []
    written = file.read_bytes()
    cut = data.draw(st.integers(0, len(written)))
    file.write_bytes(written[:cut])
    found, _ = append(file, after)
    values = [value for batch in before for value in batch]
    # The whole lines are there, in order, and nothing else.
    assert found == values[: written[:cut].count(b"\n")]
    synced = sum(len(batch) for batch, size in zip(before, sizes, strict=True) if size <= cut)
    assert len(found) >= synced
    appended = [value for batch in after for value in batch]
    assert read_log(file, same) == found + appended
    assert file.read_bytes() == b"".join(json.dumps(value).encode() + b"\n" for value in found + appended)


@given(values=st.lists(VALUES, min_size=1, max_size=3), data=st.data())
def test_reading_changes_nothing(tmp_path_factory, values, data):
    file = tmp_path_factory.mktemp("log") / "log.jsonl"
    append(file, [values])
    file.write_bytes(file.read_bytes()[: data.draw(st.integers(0, file.stat().st_size))])
    before = file.read_bytes()
    read_log(file, same)
    assert file.read_bytes() == before


def test_a_missing_file_holds_nothing_and_is_not_made_by_reading(tmp_path):
    assert read_log(tmp_path / "log.jsonl", same) == []
    assert not (tmp_path / "log.jsonl").exists()


@pytest.mark.parametrize("damage", ["nonsense", "", "[" * 100_000, '{"other": 1}', "5", '"text', "\x00\x00"])
def test_damage_before_the_last_line_names_the_file_and_changes_nothing(tmp_path, damage):
    file = tmp_path / "log.jsonl"
    file.write_text(f'{{"id": 1}}\n{damage}\n{{"id": 2}}\n{{"id"')
    before = file.read_bytes()
    for open_ in (read_log, AppendOnlyLog):
        with pytest.raises(ValueError, match=r"log\.jsonl: damaged in line 2 \(.*\): remove it, and its questions"):
            open_(file, lambda value: value["id"])
    assert file.read_bytes() == before


def test_values_are_parsed(tmp_path):
    append(tmp_path / "log.jsonl", [[["key", "answer"]]])
    assert AppendOnlyLog(tmp_path / "log.jsonl", tuple).values == [("key", "answer")]


@pytest.mark.parametrize("error", [OSError("disk full"), KeyboardInterrupt()])
def test_an_append_that_fails_leaves_nothing_behind(tmp_path, monkeypatch, error):
    file = tmp_path / "log.jsonl"
    log = AppendOnlyLog(file, same)
    log.append(["first"])

    def fail(descriptor):
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fail)
        with pytest.raises(type(error)):
            log.append(["second"])
    assert read_log(file, same) == ["first"]
    with pytest.raises(TypeError):
        log.append(["third", b"bytes"])
    log.append(["fourth"])
    log.close()
    assert read_log(file, same) == ["first", "fourth"]


def test_values_are_synced_before_append_returns(tmp_path, monkeypatch):
    log, synced = AppendOnlyLog(tmp_path / "log.jsonl", same), []
    monkeypatch.setattr(os, "fsync", lambda descriptor: synced.append(os.fstat(descriptor).st_size))
    log.append(["first"])
    log.append(["second", "third"])
    assert synced == [len('"first"\n'), len('"first"\n"second"\n"third"\n')]


def test_a_lock_is_refused_while_another_process_holds_it(tmp_path):
    code = "import sys, filelock; lock = filelock.FileLock(sys.argv[1]); lock.acquire(); "
    code += "print('held', flush=True); input()"
    command = [sys.executable, "-c", code, str(tmp_path / "lock")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout.readline() == "held\n"
        with pytest.raises(ValueError, match=r"^somebody is writing$"):
            acquire_lock(tmp_path / "lock", "somebody is writing")
        other.communicate("go\n")
    acquire_lock(tmp_path / "lock", "unused").release()
