"""Answers that are kept as they are made, and the run that goes on from them."""

import contextlib
import subprocess
import sys
from dataclasses import dataclass, field
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from strategy.evaluation import resume
from strategy.evaluation.resume import AnswerJournal


@dataclass
class Request:
    """What a journal needs of lmms-eval's requests."""

    document: int
    context: str = "What?"
    options: dict[str, Any] = field(default_factory=dict)
    task_name: str = "task"
    request_type: str = "generate_until"

    @property
    def args(self) -> tuple[Any, ...]:
        return self.context, self.options, lambda: None, self.document, self.task_name, "test"


@dataclass
class Text:
    """An answer as some of lmms-eval's wrappers give it."""

    text: str


@dataclass
class Model:
    """Answers with the number of the question, and breaks after so many."""

    most: int = 1000
    asked: list[int] = field(default_factory=list)

    def __call__(self, requests: list[Request]) -> list[Any]:
        self.asked += [request.document for request in requests]
        if len(self.asked) > self.most:
            raise KeyboardInterrupt
        return [Text(f"answer {request.document}") for request in requests]


def opened(folder, keep_tokens=1):
    return AnswerJournal(folder, {"keep_tokens": keep_tokens}, writes=True)


def about(request):
    return f"document {request.document}"


def texts(answers):
    return [getattr(each, "text", each) for each in answers]


@given(
    most=st.integers(0, 9),
    flush_every=st.integers(1, 3),
    batch_size=st.integers(1, 2),
    workers=st.sampled_from([0, 2]),
    cut=st.integers(0, 20),
)
def test_what_was_answered_is_not_asked_again(tmp_path_factory, most, flush_every, batch_size, workers, cut):
    folder, requests = tmp_path_factory.mktemp("answers"), [Request(number) for number in range(9)]
    expected = [f"answer {number}" for number in range(9)]
    before, resume.FLUSH_EVERY = resume.FLUSH_EVERY, flush_every
    try:
        journal, first, second = opened(folder), Model(most), Model()
        with contextlib.suppress(KeyboardInterrupt):
            journal.answer_missing(requests, first, "", about, lambda: batch_size, workers)
        journal.close()
        with (folder / "0.jsonl").open("a") as file:
            file.write('["run", "question", "half an'[:cut])
        journal = opened(folder)
        answers, found = journal.answer_missing(requests, second, "", about, lambda: batch_size, workers)
        journal.close()
    finally:
        resume.FLUSH_EVERY = before
    assert texts(answers) == expected
    together = flush_every * batch_size
    assert found == most // together * together if most < 9 else found == 9
    assert second.asked == list(range(found, 9))


def test_other_settings_and_other_questions_are_asked(tmp_path):
    journal = opened(tmp_path)
    journal.answer_missing([Request(1)], Model(), "", about)
    journal.close()
    journal = opened(tmp_path, keep_tokens=2)
    assert journal.answer_missing([Request(1)], Model(), "", about)[1] == 0
    others = [Request(1, "Why?"), Request(1, task_name="other"), Request(1, options={"until": ["."]}), Request(2)]
    assert journal.answer_missing(others, Model(), "", about)[1] == 0
    assert journal.answer_missing([Request(1), *others], Model(), "", about)[1] == 5


def test_functions_do_not_matter_and_repeated_questions_have_answers_of_their_own(tmp_path):
    journal, numbers = opened(tmp_path), iter(range(10))

    def asked() -> list[Request]:
        return [Request(1, options={"temperature": 1})] * 3

    first, _ = journal.answer_missing(
        asked(), lambda requests: [f"answer {next(numbers)}" for _ in requests], "", about
    )
    journal.close()
    assert first == ["answer 0", "answer 1", "answer 2"]
    assert opened(tmp_path).answer_missing(asked(), Model(), "", about) == (first, 3)


def test_no_answer_is_not_kept(tmp_path):
    journal = opened(tmp_path)
    assert journal.answer_missing([Request(1), Request(2)], lambda _: ["", "yes"], "", about) == (["", "yes"], 0)
    model = Model()
    assert journal.answer_missing([Request(1), Request(2)], model, "", about)[1] == 1
    assert model.asked == [1]


def test_a_second_run_is_refused_and_a_damaged_file_named(tmp_path):
    journal = opened(tmp_path)
    code = "from pathlib import Path; from strategy.evaluation.resume import AnswerJournal; "
    code += f"AnswerJournal(Path({str(tmp_path)!r}), {{}}, True)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert "another run is writing its answers there; wait, or give another" in done.stderr
    journal.close()
    (tmp_path / "3.jsonl").write_text("nonsense\n")
    with pytest.raises(ValueError, match=r"3\.jsonl: damaged .*: remove it, and its questions are asked again"):
        opened(tmp_path)


def test_what_differs_is_said_and_nothing_is_deleted(tmp_path):
    journal = AnswerJournal(tmp_path, {"keep_tokens": 64, "weights": "one", "torch": "2.10"}, writes=True)
    assert journal.difference() is None
    journal.answer_missing([Request(1), Request(2)], Model(), "", about)
    journal.close()
    journal = AnswerJournal(tmp_path, {"keep_tokens": 64, "weights": "two", "torch": "2.11"}, writes=True)
    assert journal.difference() == (
        f"{tmp_path} holds 2 answers of other runs, which are not used; the nearest of these runs differs in this: "
        "torch was 2.10, is 2.11; other weights"
    )
    journal.answer_missing([Request(1)], Model(), "", about)
    journal.close()
    for weights, torch, found in (("two", "2.11", 1), ("one", "2.10", 2)):
        journal = AnswerJournal(tmp_path, {"keep_tokens": 64, "weights": weights, "torch": torch}, writes=True)
        assert journal.difference() is None
        assert journal.answer_missing([Request(1), Request(2)], Model(), "", about)[1] == found
        journal.close()


def test_answers_of_version_0_2_0_are_not_used(tmp_path):
    (tmp_path / "0.jsonl").write_text('["key-0", "answer"]\n')
    journal = opened(tmp_path)
    assert "holds 1 answers of other runs" in journal.difference()
    assert "they name no settings" in journal.difference()


def test_a_changed_document_is_asked_about_again(tmp_path):
    for changed, found in (("", 0), ("", 2), (" changed", 1), (" changed", 2)):
        journal, model = opened(tmp_path), Model()
        answers, resumed = journal.answer_missing(
            [Request(1), Request(2)], model, "", lambda request, c=changed: about(request) + c * (request.document == 2)
        )
        journal.close()
        assert (texts(answers), resumed) == (["answer 1", "answer 2"], found)
        assert journal.num_changed == (found == 1)


def test_a_document_is_read_only_where_its_question_was_answered(tmp_path):
    read = []
    for _ in range(2):
        journal = opened(tmp_path)
        journal.answer_missing([Request(1)], lambda _: [""], "", lambda request: str(read.append(request)))
        journal.close()
    assert not read
