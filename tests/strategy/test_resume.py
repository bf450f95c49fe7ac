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


def texts(answers):
    return [getattr(each, "text", each) for each in answers]


@given(most=st.integers(0, 9), flush_every=st.integers(1, 4), cut=st.integers(0, 20))
def test_what_was_answered_is_not_asked_again(tmp_path_factory, most, flush_every, cut):
    folder, requests = tmp_path_factory.mktemp("answers"), [Request(number) for number in range(9)]
    expected = [f"answer {number}" for number in range(9)]
    before, resume.FLUSH_EVERY = resume.FLUSH_EVERY, flush_every
    try:
        journal, first, second = opened(folder), Model(most), Model()
        with contextlib.suppress(KeyboardInterrupt):
            journal.answer_missing(requests, first, "")
        journal.close()
        with (folder / "0.jsonl").open("a") as file:
            file.write('["key", "half an entry'[:cut])
        journal = opened(folder)
        answers, found = journal.answer_missing(requests, second, "")
        journal.close()
    finally:
        resume.FLUSH_EVERY = before
    assert texts(answers) == expected
    assert found == most // flush_every * flush_every if most < 9 else found == 9
    assert second.asked == list(range(found, 9))


def test_other_settings_and_other_questions_are_asked(tmp_path):
    journal = opened(tmp_path)
    journal.answer_missing([Request(1)], Model(), "")
    journal.close()
    journal = opened(tmp_path, keep_tokens=2)
    assert journal.answer_missing([Request(1)], Model(), "")[1] == 0
    others = [Request(1, "Why?"), Request(1, task_name="other"), Request(1, options={"until": ["."]}), Request(2)]
    assert journal.answer_missing(others, Model(), "")[1] == 0
    assert journal.answer_missing([Request(1), *others], Model(), "")[1] == 5


def test_functions_do_not_matter_and_repeated_questions_have_answers_of_their_own(tmp_path):
    journal, numbers = opened(tmp_path), iter(range(10))

    def asked() -> list[Request]:
        return [Request(1, options={"temperature": 1})] * 3

    first, _ = journal.answer_missing(asked(), lambda requests: [f"answer {next(numbers)}" for _ in requests], "")
    journal.close()
    assert first == ["answer 0", "answer 1", "answer 2"]
    assert opened(tmp_path).answer_missing(asked(), Model(), "") == (first, 3)


def test_no_answer_is_not_kept(tmp_path):
    journal = opened(tmp_path)
    assert journal.answer_missing([Request(1), Request(2)], lambda _: ["", "yes"], "") == (["", "yes"], 0)
    model = Model()
    assert journal.answer_missing([Request(1), Request(2)], model, "")[1] == 1
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
