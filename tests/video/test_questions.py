"""Reading the benchmarks' files: nothing lost, nothing shifted."""

import json
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from hypothesis import given
from hypothesis import strategies as st

from videollava.eval.video.questions import EXTENSIONS, Sample, chunk, find_video, read_samples


def write(folder, questions, answers):
    for name, entries in (("test_q.json", questions), ("test_a.json", answers)):
        (folder / name).write_text(entries if isinstance(entries, str) else json.dumps(entries))
    return folder / "test_q.json", folder / "test_a.json"


def question(key, video="vid1", text="what is it?"):
    return {"question_id": key, "video_name": video, "question": text}


def test_answers_are_matched_by_id_and_not_by_position(tmp_path):
    files = write(
        tmp_path,
        [question("a"), question(7, "vid2"), question("c")],
        [
            {"question_id": "c", "answer": "three"},
            {"question_id": "7", "answer": 2, "type": 1},
            {"question_id": "a", "answer": "one"},
        ],
    )
    samples, left_out = read_samples(*files)
    assert [(s.id, s.video, s.answer, s.type) for s in samples] == [
        ("a", "vid1", "one", None),
        (7, "vid2", "2", 1),
        ("c", "vid1", "three", None),
    ]
    assert left_out == []


def test_what_is_broken_or_unanswered_is_listed_and_shifts_nothing(tmp_path):
    files = write(
        tmp_path,
        [question("a"), "nonsense", question("lost"), {"question_id": "b", "question": "?"}, question("c")],
        [{"question_id": "a", "answer": "one"}, {"answer": "x"}, {"question_id": "c", "answer": "three"}],
    )
    samples, left_out = read_samples(*files)
    assert [(s.id, s.answer) for s in samples] == [("a", "one"), ("c", "three")]
    told = [f"{item.id} {item.reason}" for item in left_out]
    assert len(told) == 4
    assert "entry 1: no question_id" in told[0]
    assert "entry 1: a str, not an object" in told[1]
    assert told[2].startswith("lost no answer in")
    assert "entry 3: no video_name" in told[3]


@pytest.mark.parametrize(
    ("questions", "words"),
    [("{", "not JSON"), ({"a": 1}, "holds a dict, want a list"), ([question("a"), question("a")], "comes twice")],
)
def test_a_broken_file_is_named(tmp_path, questions, words):
    files = write(tmp_path, questions, [{"question_id": "a", "answer": "one"}])
    with pytest.raises(ValueError, match=rf"test_q\.json.*{words}"):
        read_samples(*files)


@pytest.mark.parametrize("name", ["clip.mp4", "clip.gif", "v_clip.webm", "v_clip.mkv"])
def test_a_video_is_found_whatever_its_extension(tmp_path, name):
    (tmp_path / name).touch()
    assert find_video(tmp_path, "clip") == tmp_path / name
    with pytest.raises(ValueError, match=r"no video other in .*\.mp4"):
        find_video(tmp_path, "other")


@given(
    name=st.text(st.characters(exclude_characters="/"), min_size=1, max_size=300),
    suffix=st.sampled_from(["", *EXTENSIONS, *map(str.upper, EXTENSIONS)]),
    there=st.booleans(),
)
def test_any_name_of_a_video_is_found_or_named(name, suffix, there):
    with TemporaryDirectory() as folder:
        try:
            if there:
                (Path(folder) / f"{name}{suffix}").write_bytes(b"")
        except (OSError, ValueError):  # no file can have such a name
            there = False
        if there:
            assert find_video(folder, name) == Path(folder) / f"{name}{suffix}"
        else:
            with pytest.raises(ValueError, match="no video"):
                find_video(folder, name)


@given(count=st.integers(0, 40), chunks=st.integers(1, 12))
def test_chunks_follow_each_other_and_miss_nothing(count, chunks):
    samples = [Sample(i, "v", "q", "a") for i in range(count)]
    assert [s for number in range(chunks) for s in chunk(samples, chunks, number)] == samples


@pytest.mark.parametrize(("count", "number"), [(0, 0), (2, 2), (2, -1)])
def test_a_chunk_there_is_not_is_refused(count, number):
    with pytest.raises(ValueError, match="chunk_idx goes from 0"):
        chunk([], count, number)
