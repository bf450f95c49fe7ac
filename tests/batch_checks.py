"""What every lmms-eval model owes to `batch_size=auto`: the answers of single questions, in batches that it chooses.

The tests of a backbone import everything from here and give a fixture `wrapper`, a `lmms_checks.Wrapper`.
"""

import pytest
import torch
from ahead_checks import WORKERS, questions, requests, threads, watch
from question_checks import Question, logged, texts

from strategy.attach import leave_lack_of_memory
from strategy.evaluation.batch_size import AUTO, BatchSize
from strategy.graph.cuda_graphs import CudaGraphCache

MOST = 4


class Gpu:
    """Memory of which each batch takes one share more than the batch before."""

    def __init__(self, share):
        self.taken, self.each = 0.0, share

    def begin(self):
        self.taken += self.each

    def share(self):
        return self.taken


def on_gpu(lm, memory):
    """Let a model on the CPU choose its batches as on a GPU with that memory."""
    lm.batches = BatchSize(AUTO, MOST, memory, tell=lm.log)
    leave_lack_of_memory(lm.model, lm.batches.can_shrink)


def counts(lm):
    record = lm.record
    return record.samples, record.visual_sum, record.kept_sum


def alike(documents):
    """The same about other pictures: questions of one length."""
    return [Question(each.visuals, question="Is there a red star?") for each in documents]


def asked_alike(lm, documents, on_read=lambda number: None):
    """Requests that all want answers of the same length, so that batches are as large as they may be."""
    found = requests(lm, documents, on_read)
    for request in found:
        next(part for part in request.args if isinstance(part, dict))["max_new_tokens"] = 3
    return found


@pytest.mark.parametrize(("simple", "workers"), [(True, WORKERS), (True, 0), (False, WORKERS)])
def test_batches_that_grow_give_the_answers_and_counts_of_single_questions(wrapper, tmp_path, simple, workers):
    documents = questions(wrapper, 10)
    documents.insert(4, Question([{"bytes": b"no picture", "path": None}]))
    seen = []
    for knobs in ("batch_size=1", f"batch_size=auto,resume_folder={tmp_path}"):
        lm = wrapper.load(f"retain_ratio=0.334,prepare_ahead={workers},{knobs}", force_simple=simple)
        if "auto" in knobs:
            on_gpu(lm, Gpu(0.0))
        asked = watch(lm)
        with logged() as log:
            answers = texts(lm.generate_until(asked_alike(lm, documents)))
        seen.append((answers, counts(lm), log.errors))
    assert seen[0] == seen[1]
    assert [len(ids) for _, ids in asked] == [1, 2, 4, 4]
    assert f"{wrapper.name}: batch_size=auto: 4 questions at a time, the most that are allowed" in log.others
    assert not threads()
    lm.journal.close()


def test_batches_stop_growing_before_memory_runs_out_and_keep_long_questions_together(wrapper):
    lm = wrapper.load("enabled=False,batch_size=auto", force_simple=True)
    on_gpu(lm, Gpu(0.15))
    asked = watch(lm)
    documents = questions(wrapper, 5)
    longest = max(range(5), key=lambda number: len(documents[number].question))
    read = []
    with logged() as log:
        lm.generate_until(asked_alike(lm, documents, read.append))
    assert max(len(ids) for _, ids in asked) <= 2
    assert read[0] == longest
    words = "2 questions at a time, which take 30% of the GPU's memory beside the model"
    assert f"{wrapper.name}: batch_size=auto: {words}" in log.others


@pytest.mark.parametrize("workers", [0, WORKERS])
def test_memory_that_runs_out_halves_the_batches_and_changes_no_answer(wrapper, workers):
    documents = alike(questions(wrapper, 11))
    single = wrapper.load("retain_ratio=0.334,batch_size=1", force_simple=True)
    expected = texts(single.generate_until(asked_alike(single, documents)))
    lm = wrapper.load(f"retain_ratio=0.334,batch_size=auto,prepare_ahead={workers}", force_simple=True)
    on_gpu(lm, Gpu(0.0))

    def before():
        if len(asked) == 4:
            raise torch.OutOfMemoryError("no memory")

    asked = watch(lm, before)
    with logged() as log:
        assert texts(lm.generate_until(asked_alike(lm, documents))) == expected
    assert counts(lm) == counts(single)
    assert [len(ids) for _, ids in asked] == [1, 2, 4, 4, 2, 2, 2, 2]
    words = "2 questions at a time from now on, since memory ran out with 4"
    assert f"{wrapper.name}: batch_size=auto: {words}" in log.others
    assert not log.errors
    assert not threads()


def test_a_lack_of_memory_of_the_graph_engine_leads_to_smaller_batches_and_not_to_the_stock_loop(wrapper, monkeypatch):
    documents = alike(questions(wrapper, 6))
    single = wrapper.load("retain_ratio=0.334,engine=graph", force_simple=True)
    expected = texts(single.generate_until(asked_alike(single, documents)))
    lm, run = wrapper.load("retain_ratio=0.334,engine=graph,batch_size=auto", force_simple=True), CudaGraphCache.run
    on_gpu(lm, Gpu(0.0))

    def full(self, key, *arguments, **options):
        if key.kind == "decode" and key.details[0] > most:
            raise torch.cuda.OutOfMemoryError("none left")
        return run(self, key, *arguments, **options)

    monkeypatch.setattr(CudaGraphCache, "run", full)
    most = 1
    with logged() as log:
        assert texts(lm.generate_until(asked_alike(lm, documents))) == expected
    assert counts(lm) == counts(single)
    assert "stock loop" not in lm.record.graph_report()
    words = "1 question at a time from now on, since memory ran out with 2"
    assert f"{wrapper.name}: batch_size=auto: {words}" in log.others
    most = 0  # not even one fits, so the stock loop answers
    with pytest.warns(UserWarning, match="memory is too small for graphs"):
        assert texts(lm.generate_until(asked_alike(lm, documents))) == expected


def test_on_a_cpu_questions_are_asked_one_by_one_which_is_said(wrapper):
    with logged() as log:
        lm = wrapper.load("batch_size=auto,max_batch_size=8,enabled=False")
    assert lm.batch_size == 1
    words = "1 question at a time, since only a GPU's memory is measured"
    assert log.others[-1] == f"{wrapper.name}: batch_size=auto: {words}"


@pytest.mark.parametrize(
    ("knobs", "words"),
    [
        ("batch_size=huge", "batch_size='huge': allowed are a whole number from 1 up, and auto"),
        ("batch_size=autos", "batch_size='autos': allowed are a whole number from 1 up, and auto"),
        ("batch_size=4,max_batch_size=8", "max_batch_size=8: allowed with batch_size=auto only, not with batch_size=4"),
    ],
)
def test_another_batch_size_is_one_sentence(wrapper, knobs, words):
    with pytest.raises(SystemExit, match=f"^{wrapper.name}: {words}"):
        wrapper.load(knobs)
