"""The file of answers survives kills, refuses mixtures, and joins chunks."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from videollava.eval.video.answers import AnswerFile, chunk_name, merge, rank_name
from videollava.eval.video.questions import LeftOut, Sample, chunk

SAMPLES = [Sample(f"q{number}", "v", f"question {number}?", "yes", number % 2 or None) for number in range(7)]
SETTINGS = {"model_path": "here", "keep_tokens": (194,)}


def run(folder, name="pred", samples=SAMPLES, settings=SETTINGS, stop_after=None, left_out=()):
    answers = AnswerFile(folder, name, settings)
    try:
        for number, sample in enumerate(s for s in samples if s.key not in answers.done):
            if number == stop_after:
                return answers.file
            answers.add(sample, f"pred of {sample.id}\nin two lines")
        answers.finish(samples, list(left_out))
        return answers.file
    finally:
        answers.close()


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return run(tmp_path_factory.mktemp("whole")).read_bytes()


def test_one_object_a_line(whole):
    entries = [json.loads(line) for line in whole.decode().splitlines()]
    assert [entry["id"] for entry in entries] == [sample.id for sample in SAMPLES]
    assert set(entries[0]) == {"id", "question", "answer", "pred"}
    assert entries[1]["type"] == 1


@given(data=st.data())
def test_cut_off_anywhere_it_ends_with_the_same_file(tmp_path_factory, whole, data):
    folder = tmp_path_factory.mktemp("cut")
    file = run(folder, stop_after=data.draw(st.integers(0, 7)))
    written = file.read_bytes()
    file.write_bytes(written[: data.draw(st.integers(0, len(written)))])
    assert run(folder).read_bytes() == whole


def test_changed_settings_are_refused_and_name_the_change(tmp_path):
    file = run(tmp_path, stop_after=3)
    before = file.read_bytes()
    with pytest.raises(ValueError, match=r"keep_tokens was \[194\], is \[64\]\): give another --output_name"):
        run(tmp_path, settings=SETTINGS | {"keep_tokens": (64,)})
    assert file.read_bytes() == before


def test_a_file_of_unknown_origin_is_left_alone(tmp_path):
    (tmp_path / "pred.json").write_text("{}\n")
    with pytest.raises(ValueError, match="not its settings"):
        run(tmp_path)


def test_damage_before_the_last_line_is_an_error(tmp_path):
    file = run(tmp_path, stop_after=3)
    file.write_text("nonsense\n" + file.read_text())
    with pytest.raises(ValueError, match=r"pred\.json: damaged"):
        run(tmp_path)


def test_a_second_run_on_the_same_file_is_refused(tmp_path):
    first = AnswerFile(tmp_path, "pred", SETTINGS)
    with pytest.raises(ValueError, match="another run is writing it"):
        AnswerFile(tmp_path, "pred", SETTINGS)
    first.close()
    run(tmp_path)


@pytest.mark.parametrize("count", [2, 3, 7, 9])
def test_chunks_join_into_the_file_of_one_run(tmp_path, whole, count):
    for number in reversed(range(count)):
        assert merge(tmp_path, "pred", count) is None
        lost = [LeftOut(number, "v", "gone")]
        run(tmp_path, chunk_name("pred", count, number), chunk(SAMPLES, count, number), left_out=lost)
    assert merge(tmp_path, "pred", count).read_bytes() == whole
    assert [item["id"] for item in json.loads((tmp_path / "pred.left_out.json").read_text())] == list(range(count))


def test_an_answer_that_came_late_stands_in_its_place(tmp_path, whole):
    run(tmp_path, samples=SAMPLES[:2] + SAMPLES[3:])
    assert run(tmp_path).read_bytes() == whole


@given(data=st.data())
def test_whatever_any_number_of_ranks_left_ends_with_the_same_file(tmp_path_factory, whole, data):
    folder = tmp_path_factory.mktemp("ranks")
    for stopped in data.draw(st.lists(st.integers(1, 4), max_size=3)):
        answers = AnswerFile(folder, "pred", SETTINGS)
        answers.merge_ranks()
        waiting = [sample for sample in SAMPLES if sample.key not in answers.done]
        for rank in range(stopped):
            mine = waiting[rank::stopped]
            mine = mine[: data.draw(st.integers(0, len(mine)))]
            part = AnswerFile(folder, rank_name("pred", rank), SETTINGS) if rank else answers
            for sample in mine:
                part.add(sample, f"pred of {sample.id}\nin two lines")
            part.close()
            written = part.file.read_bytes()
            part.file.write_bytes(written[: data.draw(st.integers(max(0, len(written) - 20), len(written)))])
    answers = AnswerFile(folder, "pred", SETTINGS)
    answers.merge_ranks()
    answers.close()
    assert run(folder).read_bytes() == whole
    assert not list(folder.glob("*.rank*"))


def test_answers_of_a_rank_still_at_work_or_of_other_settings_are_not_taken(tmp_path):
    part = AnswerFile(tmp_path, rank_name("pred", 1), SETTINGS)
    part.add(SAMPLES[0], "yes")
    answers = AnswerFile(tmp_path, "pred", SETTINGS)
    with pytest.raises(ValueError, match=r"pred\.rank1\.json: another run is writing it"):
        answers.merge_ranks()
    part.close()
    answers.close()
    for file in tmp_path.glob("pred.settings.json"):
        file.unlink()
    (tmp_path / "pred.json").unlink()
    answers = AnswerFile(tmp_path, "pred", SETTINGS | {"keep_tokens": (64,)})
    with pytest.raises(ValueError, match=r"pred\.rank1\.json was begun with other settings"):
        answers.merge_ranks()
    answers.close()
