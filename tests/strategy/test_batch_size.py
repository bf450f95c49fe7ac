"""How many questions are answered at a time: found by answering, and halved where memory runs out after all."""

from collections import Counter
from dataclasses import dataclass, field
from itertools import chain, pairwise
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from strategy.distributed import collectives
from strategy.distributed.watchdog import PassLostError
from strategy.evaluation import batch_size
from strategy.evaluation.batch_size import AUTO, LARGEST, SHARE, BatchSize, GpuMemory, take_batch_size
from strategy.evaluation.questions import GROUP_BATCHES, QuestionAnswerer
from strategy.evaluation.requests import answer_longest_first
from strategy.metrics.record import RunRecord


@dataclass
class Room:
    """Memory in which a question takes `each` of `room` bytes, and a batch `alone` more."""

    each: float
    alone: float = 0.0
    room: float = 1000.0
    taken: float = 0.0

    def begin(self) -> None:
        self.taken = 0.0

    def take(self, questions: int) -> None:
        if (taken := self.alone + questions * self.each) > self.room:
            raise torch.OutOfMemoryError(f"no {taken} bytes")
        self.taken = max(self.taken, taken)

    def share(self) -> float:
        return self.taken / self.room


@dataclass
class Model:
    """Answers in batches that take memory, like the models of lmms-eval.

    asked: the batches. lost: the questions that fail. grows: from which number on a question takes ten times as much.
    """

    memory: Room
    batches: BatchSize
    lost: tuple[int, ...] = ()
    grows: int = 10**6
    asked: list[list[int]] = field(default_factory=list)
    shards: Any = None
    record: RunRecord = field(default_factory=lambda: RunRecord("clse", 3, None))

    def __post_init__(self) -> None:
        self.task_dict = {"task": {"test": list(range(1000))}}

    def prepare_text(self, text: str) -> str:
        return text

    def prepare_picture(self, picture: Any) -> Any:
        return picture

    def check_prompt(self, text: str, visuals: int) -> None: ...

    def answer(self, requests: list[Any]) -> list[str]:
        documents = [request.args[3] for request in requests]
        answers, size = [], self.batches.size
        for first in range(0, len(documents), size):
            batch = documents[first : first + size]
            self.asked.append(batch)
            self.record.add_stages(len(batch), [4] * len(batch), [])
            self.memory.take(sum(10 if number >= self.grows else 1 for number in batch))
            if lost := set(batch) & set(self.lost):
                raise ValueError(f"question {lost} is broken")
            answers += [f"answer {number}" for number in batch]
        return answers


@dataclass(frozen=True)
class Request:
    arguments: tuple[Any, ...]

    @property
    def args(self) -> tuple[Any, ...]:
        return self.arguments


def requests(count: int) -> list[Request]:
    return [Request((f"What is {n}?", {"max_new_tokens": 1}, lambda _: [], n, "task", "test")) for n in range(count)]


def answered(model: Model, count: int) -> tuple[list[str], list[str]]:
    """The answers of a model to so many questions, and the sentences about those that fail."""
    told: list[str] = []
    answers = QuestionAnswerer(model, model.answer, "", model.batches, told.append)(requests(count))
    return answers, told


def auto(memory: Room, said: list[tuple[str, str]], **more: Any) -> BatchSize:
    return BatchSize(AUTO, memory=memory, tell=lambda *line: said.append(line), **more)


@given(each=st.floats(0.1, 600), alone=st.floats(0, 300), count=st.integers(1, 300), most=st.integers(1, 80))
def test_batches_double_while_memory_allows_and_each_question_is_answered_once(each, alone, count, most):
    said: list[tuple[str, str]] = []
    memory = Room(each, alone)
    model = Model(memory, auto(memory, said, most=most))
    answers, _ = answered(model, count)
    assert answers == [f"answer {number}" for number in range(count)]
    assert list(chain(*model.asked)) == list(range(count))
    assert model.record.prompts == count
    largest = max(map(len, model.asked))
    assert largest <= most
    assert largest == 1 or alone + largest * each <= SHARE * memory.room  # what is expected is not exceeded
    if not model.batches.growing and model.batches.size < most:
        assert 2 * (alone + model.batches.size * each) > SHARE * memory.room
        assert len(said) == 1
    sizes = [len(batch) for batch in model.asked]
    assert sizes[:7] == [min(2**n, most, model.batches.size) for n in range(7)][: len(sizes[:7])] or sum(sizes) == count


def test_what_was_found_is_told_once_and_then_groups_are_whole_again():
    said: list[tuple[str, str]] = []
    memory = Room(100 / 8)
    model = Model(memory, auto(memory, said))
    handed, answer = [], model.answer
    model.answer = lambda part: handed.append(len(part)) or answer(part)
    answered(model, 600)
    assert handed == [1, 2, 4, 8, 16, 32, 32 * GROUP_BATCHES, 600 - 63 - 32 * GROUP_BATCHES]
    words = "32 questions at a time, which take 40% of the GPU's memory beside the model"
    assert said == [("INFO", f"batch_size=auto: {words}")]


@pytest.mark.parametrize(
    ("memory", "more", "words"),
    [
        (None, {}, "1 question at a time, since only a GPU's memory is measured"),
        (Room(0.1), {"most": 1}, "1 question at a time, the most that are allowed"),
        (Room(0.1), {"most": 6}, "6 questions at a time, the most that are allowed"),
        (Room(0.1), {}, f"{LARGEST} questions at a time, the most that are allowed"),
        (Room(999), {}, "1 question at a time, which take 100% of the GPU's memory beside the model"),
    ],
)
def test_a_limit_is_named(memory, more, words):
    said: list[tuple[str, str]] = []
    model = Model(memory or Room(1), auto(memory, said, **more))
    answered(model, 130)
    assert said == [("INFO", f"batch_size=auto: {words}")]


def test_too_few_questions_are_named():
    said: list[tuple[str, str]] = []
    memory = Room(0.1)
    batches = auto(memory, said)
    batches.finish()
    assert not said
    answered(Model(memory, batches), 3)
    batches.finish()
    [(_, words)] = said
    assert words.startswith("batch_size=auto: up to 4 questions at a time, since there were too few")
    answered(Model(memory, batches), 70)
    assert batches.size == LARGEST


def test_a_number_that_is_given_stays():
    batches = BatchSize(8, memory=Room(1))
    assert (batches.size, batches.growing) == (8, False)
    model = Model(Room(200), batches)
    with pytest.raises(torch.OutOfMemoryError):
        answered(model, 8)
    assert batches.size == 8


@pytest.mark.parametrize(("grows", "halved"), [(3, [4]), (40, [32, 16, 8]), (90, [25, 12, 6])])
def test_memory_that_runs_out_halves_the_batches_and_no_answer_is_lost_or_counted_twice(grows, halved):
    said: list[tuple[str, str]] = []
    memory = Room(each=11)
    model = Model(memory, auto(memory, said), lost=(50,), grows=grows)
    answers, told = answered(model, 120)
    assert answers == ["" if number == 50 else f"answer {number}" for number in range(120)]
    assert told == ["task task, question 50: not answered, question {50} is broken"]
    assert model.record.prompts == 119
    assert model.batches.size == halved[-1]
    assert [words for level, words in said if level == "WARNING"] == [
        f"batch_size=auto: {size} questions at a time from now on, since memory ran out with {before}"
        for before, size in pairwise(halved)
    ]


def test_a_question_that_does_not_fit_alone_ends_the_run():
    said: list[tuple[str, str]] = []
    memory = Room(each=101)
    model = Model(memory, auto(memory, said), grows=20)
    with pytest.raises(torch.OutOfMemoryError):
        answered(model, 40)
    assert model.asked[-1] == [20]
    assert not model.batches.can_shrink()


def test_while_others_wait_in_a_pass_memory_that_runs_out_ends_the_run():
    said: list[tuple[str, str]] = []
    memory = Room(each=40)
    shared = Model(memory, auto(memory, said, agree=bool), grows=20)
    sharded = Model(memory, auto(memory, said), grows=20, shards=SimpleNamespace(in_pass=True))
    for model in (shared, sharded):
        with pytest.raises(torch.OutOfMemoryError):
            answered(model, 60)
        assert len(model.asked[-1]) > 1
    assert not [words for level, words in said if level == "WARNING"]


def test_a_pass_that_failed_while_other_ranks_wait_in_it_ends_the_run():
    model = Model(Room(1), BatchSize(1))

    def answer(part: list[Any]) -> list[str]:
        model.asked.append([request.args[3] for request in part])
        raise PassLostError("engine=graph: the other ranks wait") from torch.OutOfMemoryError("none left")

    model.answer = answer
    with pytest.raises(PassLostError, match="the other ranks wait"):
        answered(model, 8)
    assert len(model.asked) == 1


def test_ranks_that_share_a_model_take_the_least_of_theirs(monkeypatch):
    said: list[tuple[str, str]] = []
    others = iter([True, True, False])
    memory = Room(0.1)
    model = Model(memory, auto(memory, said, agree=lambda fits: fits and next(others)))
    answered(model, 60)
    assert model.batches.size == 4

    def least(own: list[int], device: Any, group: Any) -> list[int]:
        assert (device, group) == (torch.device("cpu"), "group")
        return [min(*own, 0)]

    monkeypatch.setattr(collectives, "all_reduce_min", least)
    monkeypatch.setattr(collectives, "is_first_rank", lambda group: False)
    monkeypatch.setattr(batch_size, "leave_lack_of_memory", lambda *_: None)
    split = BatchSize.for_model(torch.nn.Linear(1, 1), "group", AUTO, LARGEST, lambda *line: said.append(line))
    assert split.agree is not None
    assert split.agree(True) is False
    assert len(said) == 1


def test_the_fullest_gpu_counts(monkeypatch):
    one, two = torch.device("cuda:0"), torch.device("cuda:1")
    held, peaks = {one: 100, two: 400}, {one: 300, two: 450}
    reset: Counter[torch.device] = Counter()
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda device: reset.update([device]))
    monkeypatch.setattr(torch.cuda, "memory_allocated", held.__getitem__)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", peaks.__getitem__)
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: peaks[device] + 50)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (1000 - peaks[device], 2000))
    memory = GpuMemory([one, two])
    memory.begin()
    assert reset == {one: 1, two: 1}
    assert memory.share() == pytest.approx(max(200 / 950, 50 / 650))


@pytest.mark.parametrize(
    ("given", "expected", "first"),
    [
        ({}, (1, LARGEST), 1),
        ({"batch_size": "8"}, (8, LARGEST), 8),
        ({"batch_size": "auto"}, (AUTO, LARGEST), 1),
        ({"batch_size": " AUTO "}, (AUTO, LARGEST), 1),
        ({"batch_size": "auto", "max_batch_size": 16}, (AUTO, 16), 1),
        ({"batch_size": 4, "max_batch_size": None}, (4, LARGEST), 4),
    ],
)
def test_what_may_be_given(given, expected, first):
    arguments = dict(given)
    assert take_batch_size(arguments) == expected
    assert arguments == {"batch_size": first}


@pytest.mark.parametrize("value", ["huge", 0, -1, "autos", "auto:4", 1.5, "", None, True])
def test_another_batch_size_is_refused(value):
    with pytest.raises(ValueError, match="allowed are a whole number from 1 up, and auto, for as many") as refused:
        take_batch_size({"batch_size": value})
    assert str(refused.value).startswith(f"batch_size={value!r}: ")


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (
            {"batch_size": 4, "max_batch_size": 8},
            "max_batch_size=8: allowed with batch_size=auto only, not with batch_size=4",
        ),
        ({"batch_size": AUTO, "max_batch_size": 0}, "max_batch_size=0: allowed is a whole number from 1 up"),
    ],
)
def test_another_largest_batch_size_is_refused(given, words):
    with pytest.raises(ValueError, match=words):
        take_batch_size(given)


def test_a_batch_that_was_asked_in_parts_tells_nothing_of_a_whole_one():
    said: list[tuple[str, str]] = []
    memory = Room(10)
    model = Model(memory, auto(memory, said), lost=(1,))
    answers, _ = answered(model, 40)
    # The second batch, 1 and 2, was asked one by one, so two questions at a time were tried again.
    assert [len(batch) for batch in model.asked if 1 not in batch][:4] == [1, 1, 2, 4]
    assert answers.count("") == 1
    mixed = requests(40)
    for number, each in enumerate(mixed):
        each.args[1]["max_new_tokens"] += number % 2
    model = Model(memory, auto(memory, said))
    QuestionAnswerer(model, model.answer, "", model.batches, lambda sentence: None)(mixed)
    assert model.batches.size == 2, "a part with two kinds of options is no batch"


def test_the_longest_texts_of_each_task_are_answered_first():
    texts = [("a", "one"), ("bb", "two"), ("ccc", "one"), ("dddd", "two"), ("eee", "one")]
    asked = [Request((text, {}, print, n, task, "test")) for n, (text, task) in enumerate(texts)]
    order: list[int] = []

    def answer(part: list[Any]) -> list[str]:
        order.extend(request.args[3] for request in part)
        return [f"answer {request.args[3]}" for request in part]

    assert answer_longest_first(answer, asked) == [f"answer {number}" for number in range(5)]
    assert order == [2, 4, 0, 3, 1]
