"""What every lmms-eval model owes while threads prepare the next questions: nothing but time may differ.

The tests of a backbone import everything from here and give a fixture `wrapper`, a `lmms_checks.Wrapper`.
"""

import threading

import pytest
import torch
from lmms_eval.api.instance import Instance
from lmms_eval.api.task import ConfigurableMessagesTask
from question_checks import Question, logged, texts

from strategy.evaluation import resume
from strategy.evaluation.ahead import THREAD_NAME

WAIT = 60  # seconds after which a thread that should have come is taken for lost
WORKERS = 2


def threads():
    """The threads that work ahead, here and in lmms-eval's own loops."""
    names = (THREAD_NAME, "ThreadPoolExecutor")
    return [thread for thread in threading.enumerate() if thread.name.startswith(names)]


def questions(wrapper, count):
    return [
        Question([row["image"]], question=row["question"] + " Please." * (n % 3))
        for n, row in enumerate(wrapper.questions.select(range(count)))
    ]


def requests(lm, documents, on_read=lambda number: None):
    """The questions of documents in the form that a model takes; every third one wants a shorter answer."""
    lm.task_dict = {"test": {"test": list(enumerate(documents))}}

    def visuals(document):
        number, each = document
        on_read(number)
        if isinstance(each.visuals, Exception):
            raise each.visuals
        return each.visuals

    def messages(document):
        return ConfigurableMessagesTask._build_user_turn(visuals(document), document[1].question)

    found = []
    for number, each in enumerate(documents):
        options = {"max_new_tokens": 2 if number % 3 else 3, "temperature": 0, "do_sample": False}
        place = (number, "test", "test")
        simple, chat = (each.question, options, visuals, *place), (each.question, messages, options, *place)
        found.append(
            Instance(
                request_type="generate_until",
                arguments=simple if lm.is_simple else chat,
                idx=0,
                metadata={"task": "test", "repeats": 1, "doc_id": number},
            )
        )
    return found


def watch(lm, before=lambda: None):
    """Return a list that gets the thread and the token ids of each batch that the model answers."""
    asked, generate = [], lm.model.generate

    def watched(*arguments, **options):
        ids = arguments[0] if arguments else options["input_ids"]
        asked.append((threading.get_ident(), ids.tolist()))
        before()
        return generate(*arguments, **options)

    lm.model.generate = watched
    return asked


@pytest.mark.parametrize(("simple", "faulty"), [(True, True), (False, False)])
def test_batches_order_answers_counts_and_sentences_are_those_of_one_thread(wrapper, simple, faulty):
    documents = questions(wrapper, 5)
    documents.insert(2, Question([], question="Is there a red star?"))
    documents.insert(3, Question([{"bytes": b"no picture", "path": None}]))
    if faulty:
        documents.insert(5, Question(KeyError("image_5")))
    seen = []
    for workers in (0, WORKERS):
        readers = set()
        knobs = f"retain_ratio=0.334,batch_size=2,prepare_ahead={workers}"
        lm = wrapper.load(knobs, force_simple=simple)
        asked = watch(lm)
        with logged() as log:
            answers = lm.generate_until(requests(lm, documents, lambda _: readers.add(threading.current_thread())))  # noqa: B023
        record = lm.record
        counts = record.samples, record.prompts, record.decoded, record.visual_sum, record.kept_sum
        seen.append((asked, texts(answers), counts, log.errors))
        if workers:
            assert threading.current_thread() not in readers
        else:  # some of lmms-eval's own loops read in a thread
            assert not [thread for thread in readers if thread.name.startswith(THREAD_NAME)]
        assert not threads()
    assert seen[0] == seen[1]
    assert {thread for thread, _ in seen[1][0]} == {threading.get_ident()}
    assert len(seen[1][3]) == 2 + faulty


def test_the_next_pictures_are_prepared_while_the_model_answers_and_no_more_than_these(wrapper, monkeypatch):
    lm = wrapper.load(f"enabled=False,prepare_ahead={WORKERS}", force_simple=True)
    whole = getattr(lm, "processor", None)
    kind, name = (type(whole), "__call__") if whole else (type(lm), "_prepared")
    stock, prepared, read = getattr(kind, name), threading.Semaphore(0), []

    def prepare(self, *arguments, **options):
        result = stock(self, *arguments, **options)
        prepared.release()
        return result

    def before():
        if len(asked) == 1:
            for _ in range(1 + WORKERS):
                assert prepared.acquire(timeout=WAIT)
        assert len(read) <= len(asked) + WORKERS

    monkeypatch.setattr(kind, name, prepare)
    asked = watch(lm, before)
    with logged() as log:
        lm.generate_until(requests(lm, questions(wrapper, 5), read.append))
    assert len(asked) == 5
    assert not log.errors


@pytest.mark.parametrize("error", [KeyboardInterrupt, torch.OutOfMemoryError])
def test_what_ends_a_run_loses_no_answer_and_leaves_no_thread(wrapper, tmp_path, monkeypatch, error):
    monkeypatch.setattr(resume, "FLUSH_EVERY", 2)
    documents, knobs = questions(wrapper, 4), "retain_ratio=0.334"
    whole = wrapper.load(f"{knobs},prepare_ahead=0", force_simple=True)
    expected = texts(whole.generate_until(requests(whole, documents)))
    knobs += f",resume_folder={tmp_path}"
    lm, read = wrapper.load(f"{knobs},prepare_ahead={WORKERS}", force_simple=True), threading.Semaphore(0)

    def before():
        if len(asked) == 3:
            for _ in range(4):  # the last one is being prepared, or is ready
                assert read.acquire(timeout=WAIT)
            raise error

    asked = watch(lm, before)
    with pytest.raises(error):
        lm.generate_until(requests(lm, documents, lambda _: read.release()))
    assert not threads()
    lm.journal.close()
    assert sum(len(file.read_text().splitlines()) for file in tmp_path.glob("*.jsonl")) == 2
    again = wrapper.load(f"{knobs},prepare_ahead={WORKERS + 1}", force_simple=True)
    asked = watch(again)
    assert texts(again.generate_until(requests(again, documents))) == expected
    assert len(asked) == again.record.samples == 2
    again.journal.close()
