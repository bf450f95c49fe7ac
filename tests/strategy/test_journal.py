"""Answers that are kept as they are made, and the run that goes on from them."""

import contextlib
import subprocess
import sys
from dataclasses import dataclass, field
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from strategy.evaluation import resume as journal
from strategy.evaluation.resume import Journal


@dataclass
class Request:
    """What a journal needs of lmms-eval's requests."""

    document: int
    context: str = "What?"
    knobs: dict[str, Any] = field(default_factory=dict)
    task_name: str = "task"
    request_type: str = "generate_until"

    @property
    def args(self) -> tuple[Any, ...]:
        return self.context, self.knobs, lambda: None, self.document, self.task_name, "test"


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


def opened(folder, knob=1):
    return Journal(folder, {"knob": knob}, writes=True)


def closed(log):
    log.stream.close()
    log.lock.release()


def texts(answers):
    return [getattr(each, "text", each) for each in answers]


@given(most=st.integers(0, 9), at_once=st.integers(1, 4), cut=st.integers(0, 20))
def test_what_was_answered_is_not_asked_again(tmp_path_factory, most, at_once, cut):
    folder, requests = tmp_path_factory.mktemp("answers"), [Request(number) for number in range(9)]
    expected = [f"answer {number}" for number in range(9)]
    before, journal.AT_ONCE = journal.AT_ONCE, at_once
    try:
        log, first, second = opened(folder), Model(most), Model()
        with contextlib.suppress(KeyboardInterrupt):
            log.fill_up(requests, first, "")
        closed(log)
        with (folder / "0.jsonl").open("a") as file:
            file.write('["key", "half an entry'[:cut])
        log = opened(folder)
        answers, found = log.fill_up(requests, second, "")
        closed(log)
    finally:
        journal.AT_ONCE = before
    assert texts(answers) == expected
    assert found == most // at_once * at_once if most < 9 else found == 9
    assert second.asked == list(range(found, 9))


def test_other_settings_and_other_questions_are_asked(tmp_path):
    log = opened(tmp_path)
    log.fill_up([Request(1)], Model(), "")
    closed(log)
    log = opened(tmp_path, knob=2)
    assert log.fill_up([Request(1)], Model(), "")[1] == 0
    others = [Request(1, "Why?"), Request(1, task_name="other"), Request(1, knobs={"until": ["."]}), Request(2)]
    assert log.fill_up(others, Model(), "")[1] == 0
    assert log.fill_up([Request(1), *others], Model(), "")[1] == 5


def test_functions_do_not_matter_and_repeated_questions_have_answers_of_their_own(tmp_path):
    log, numbers = opened(tmp_path), iter(range(10))

    def asked() -> list[Request]:
        return [Request(1, knobs={"temperature": 1})] * 3

    first, _ = log.fill_up(asked(), lambda requests: [f"answer {next(numbers)}" for _ in requests], "")
    closed(log)
    assert first == ["answer 0", "answer 1", "answer 2"]
    assert opened(tmp_path).fill_up(asked(), Model(), "") == (first, 3)


def test_no_answer_is_not_kept(tmp_path):
    log = opened(tmp_path)
    assert log.fill_up([Request(1), Request(2)], lambda _: ["", "yes"], "") == (["", "yes"], 0)
    model = Model()
    assert log.fill_up([Request(1), Request(2)], model, "")[1] == 1
    assert model.asked == [1]


def test_a_second_run_is_refused_and_a_damaged_file_named(tmp_path):
    log = opened(tmp_path)
    code = "from pathlib import Path; from strategy.evaluation.resume import Journal; "
    code += f"Journal(Path({str(tmp_path)!r}), {{}}, True)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert "another run is writing its answers there; wait, or give another" in done.stderr
    closed(log)
    (tmp_path / "3.jsonl").write_text("nonsense\n")
    with pytest.raises(ValueError, match=r"3\.jsonl: damaged .*: remove it, and its questions are asked again"):
        opened(tmp_path)
