"""What every lmms-eval model owes: the same answers in any batch, several pictures, and no fear of broken ones.

The tests of a backbone import everything from here and give a fixture `wrapper`, a `Wrapper`.
"""

import functools
import io
import os
import struct
import zlib
from dataclasses import dataclass
from pathlib import Path

import libyaml
import pytest
from datasets import Dataset, Features, Image, Value, load_dataset
from lmms_eval.api.instance import Instance
from lmms_eval.evaluator import simple_evaluate
from lmms_eval.models import get_model
from lmms_eval.tasks import TaskManager
from loguru import logger
from matrix import FULL

ROOT = Path(__file__).parents[1]
CHECKPOINTS = ROOT / "examples/shapes/checkpoints"
TASKS = ROOT / "examples/shapes/tasks"
LMMS_EVAL = libyaml.__file__  # a script that starts sooner than `-m lmms_eval`
ENVIRONMENT = os.environ | {"CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1"}


@functools.cache
def task_manager(name):
    """The tasks that a model of lmms-eval can be asked, read from 3,000 files."""
    return TaskManager(include_path=[str(TASKS), str(ROOT / "examples/clutter/tasks")], model_name=name)


@dataclass(frozen=True)
class Wrapper:
    """A pruned model of lmms-eval and its small checkpoint.

    task: what it is asked; stock: the model it extends, if any; cell: the pixels of a visual token's side.
    places: what stands for the first and the second picture in a question; interleave: what lets it stand there.
    rightly: options at which the pruned checkpoint answers rightly, where it does not at the published ones.
    always: options that are always given.
    """

    name: str
    checkpoint: Path
    task: str
    stock: str = ""
    cell: int = 14
    places: tuple[str, str] = ("<image>", "<image>")
    interleave: str = ""
    rightly: str = ""
    always: str = ""

    def load(self, knobs, name=None, **options):
        arguments = f"pretrained={self.checkpoint},device=cpu,{knobs}{self.always}"
        return get_model(name or self.name, **options).create_from_arg_string(arguments)

    @property
    def questions(self):
        return load_dataset("parquet", data_files={"test": str(TASKS / f"{self.task}_test.parquet")})["test"]

    def answers(self, lm, limit, name=None):
        """The words a model says to the first questions."""
        manager, tasks = task_manager(name or self.name), [self.task]
        results = simple_evaluate(
            model=lm, tasks=tasks, task_manager=manager, limit=limit, log_samples=True, batch_size=1
        )
        return [sample["filtered_resps"][0] for sample in results["samples"][self.task]]


def asked(documents, task, visuals=lambda document: [document["image"]]):
    """The questions of documents, as lmms-eval asks them."""
    options = {"max_new_tokens": 4, "temperature": 0, "do_sample": False}
    questions = documents["question"] if isinstance(documents, Dataset) else [d["question"] for d in documents]
    return [
        Instance(
            request_type="generate_until",
            arguments=(question, dict(options), visuals, number, task, "test"),
            idx=0,
            metadata={"task": task, "repeats": 1, "doc_id": number},
        )
        for number, question in enumerate(questions)
    ]


def ask(lm, documents, visuals=lambda document: [document["image"]]):
    """Answers to the questions of documents."""
    lm.task_dict = {"test": {"test": documents}}
    return lm.generate_until(asked(documents, "test", visuals))


def measured_is_shown_and_saved(saved, shown):
    """lmms-eval's closing table and its file of results hold what the run record measured."""
    measured = saved["throughput"]
    for part in ("vision", "prefill", "scoring", "head", "decode"):
        assert measured[f"avg_multiply_adds_{part}"] > 0
    assert measured["avg_tokens_per_layer"] < measured["avg_visual_tokens"]
    assert measured["avg_cache_bytes"] > 0
    assert measured["total_elapsed_time"] > measured["avg_seconds_prefill"] > 0
    assert "tokens_per_layer" in shown


@pytest.mark.parametrize("knobs", ["enabled=False", "keep_tokens=64"])
def test_a_batch_gives_the_answers_of_single_questions(wrapper, knobs):
    single, batched = wrapper.load(knobs), wrapper.load(f"{knobs},batch_size=8")
    records, count = (single.record, batched.record), 20 if FULL else 12
    assert wrapper.answers(single, count) == wrapper.answers(batched, count)
    assert records[0].kept_sum == records[1].kept_sum
    assert records[0].samples == records[1].samples == count


def test_several_pictures_and_none_in_any_batch(wrapper):
    rows, (first, second) = wrapper.questions, wrapper.places
    documents = [
        {"question": f"{first} {rows[0]['question']}", "images": [rows[0]["image"]]},
        {"question": f"First {first} then {second} {rows[2]['question']}", "images": [r["image"] for r in rows][:3:2]},
        {"question": "Is there a red star?", "images": []},
        {"question": f"{first} {second} How many objects are there?", "images": [r["image"] for r in rows][4:7:2]},
    ]
    said, totals = [], []
    for batch in (1, 4):
        options = f"retain_ratio=0.334,batch_size={batch}{wrapper.interleave}{wrapper.rightly}"
        lm = wrapper.load(options, force_simple=True)
        said.append(ask(lm, documents, lambda document: list(document["images"])))
        totals.append((lm.record.samples, lm.record.visual_sum, lm.record.kept_sum))
    assert said[0] == said[1]
    assert totals[0] == totals[1]
    assert totals[0][0] == 3
    assert said[0][0] == rows[0]["answer"]


def picture_bytes(picture, **options):
    stream = io.BytesIO()
    picture.convert("RGB").save(stream, **{"format": "PNG"} | options)
    return stream.getvalue()


def bomb():
    """A picture of a few bytes that says it is 40000 x 40000 pixels."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", 40000, 40000, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


def test_bad_pictures_are_named_and_lose_no_answer(wrapper):
    rows = [wrapper.questions[number] for number in (0, 5)]
    good = [picture_bytes(row["image"]) for row in rows]
    frames = [row["image"].convert("RGB").resize((64, 64)) for row in rows]
    animated = picture_bytes(frames[0], format="GIF", save_all=True, append_images=frames[1:])
    bad = {
        "identify image": b"",
        "Truncated File Read": good[0][:20],
        "identify": b"no picture",
        "exceeds limit": bomb(),
        "animated picture of 2 frames": animated,
    }
    pictures = [good[0], *bad.values(), good[1]]
    questions = [rows[0]["question"]] * (1 + len(bad)) + [rows[1]["question"]]
    features = Features({"question": Value("string"), "image": Image()})
    images = [{"bytes": data, "path": None} for data in pictures]
    documents = Dataset.from_dict({"question": questions, "image": images}, features=features)
    told = []
    sink = logger.add(lambda message: told.append(message.record["message"]), level="ERROR")
    try:
        answers = ask(wrapper.load("keep_tokens=192,batch_size=3", force_simple=True), documents)
        assert ask(wrapper.load("keep_tokens=192", force_simple=True), documents.select(range(1, 6))) == [""] * 5
    finally:
        logger.remove(sink)
    expected = ask(wrapper.load("keep_tokens=192", force_simple=True), documents.select([0, 6]))
    assert answers == [expected[0], *[""] * len(bad), expected[1]]
    assert all(expected)
    for line, (number, words) in zip(told, enumerate(bad, start=1), strict=False):
        assert line.startswith(f"{wrapper.name}: task test, question {number}: not answered, its picture is unreadable")
        assert words in line
    assert told[5] == f"{wrapper.name}: 5 of 7 questions were not answered"
