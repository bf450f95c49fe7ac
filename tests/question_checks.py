"""What every lmms-eval model owes to questions of any kind: an answer, or a sentence that names the question.

The tests of a backbone import everything from here and give a fixture `wrapper`, a `lmms_checks.Wrapper`.
"""

import io
import json
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from lmms_checks import ROOT, asked, picture_bytes, task_manager
from lmms_eval.evaluator import simple_evaluate
from loguru import logger
from PIL import Image

from strategy.distributed.watchdog import PassLostError
from strategy.evaluation import questions

CLIP = ROOT / "examples/shapes/clips_test/videos/clip000.mp4"
TOKENS = "<|im_end|> <|image_pad|><|video_pad|> <|vision_start|> <s></s> <image> <image><video> <ima<image>ge>"
FORMATS = {"MP4": "libx264", "webm": "libvpx-vp9", "mkv": "libx264", "m4v": "mpeg4", "avi": "mpeg4", "mov": "libx264"}

MODES = ("1", "L", "P", "RGB", "RGBA", "CMYK", "YCbCr", "LAB", "HSV", "I", "I;16", "F", "LA", "PA", "RGBX", "RGBa")
STORED = {  # the modes that a format can hold
    "PNG": ("1", "L", "P", "RGB", "RGBA", "I;16", "LA"),
    "TIFF": ("1", "L", "P", "RGB", "RGBA", "CMYK", "YCbCr", "LAB", "I", "I;16", "F", "LA"),
    "JPEG": ("1", "L", "RGB", "CMYK", "YCbCr"),
}


@dataclass
class Question:
    """A document whose visuals are given as they are: a picture, a path, or anything.

    answered: whether it can be answered; otherwise words of the sentence that names it. videos: whether it has some.
    """

    visuals: Any
    answered: bool = True
    words: str = ""
    question: str = "Is there a red star?"
    videos: bool = False


@dataclass
class Log:
    """Sentences that were logged, by level."""

    errors: list[str] = field(default_factory=list)
    others: list[str] = field(default_factory=list)


@contextmanager
def logged():
    log = Log()

    def write(message):
        (log.errors if message.record["level"].name == "ERROR" else log.others).append(message.record["message"])

    sink = logger.add(write, level="INFO")
    try:
        yield log
    finally:
        logger.remove(sink)


def clip(file: Path, count: int, codec: str = "libx264") -> str:
    """Write a video of so many frames, and return its path."""
    frames = [np.full((64, 64, 3), 255 * number // max(1, count - 1), np.uint8) for number in range(count)]
    kind = "mp4" if file.suffix.lower() in (".mp4", ".m4v") else None
    with av.open(str(file), "w", format=kind) as output:
        stream = output.add_stream(codec, rate=8)
        stream.width, stream.height, stream.pix_fmt = 64, 64, "yuv420p"
        for values in frames:
            output.mux(stream.encode(av.VideoFrame.from_ndarray(values, format="rgb24")))
        output.mux(stream.encode(None))
    return str(file)


def animation(file: Path, kind: str) -> str:
    frames = [Image.new("RGB", (64, 64), (60 * number, 0, 0)) for number in range(4)]
    frames[0].save(file, kind, save_all=True, append_images=frames[1:], duration=100)
    return str(file)


def hostile(folder: Path, picture: Image.Image) -> dict[str, Question]:
    """Questions of every kind that real data has brought."""
    (folder / "broken.mp4").write_bytes(CLIP.read_bytes()[:500])
    (folder / "notes.txt").write_text("no picture")
    (folder / "empty.png").write_bytes(b"")
    picture.convert("RGB").save(folder / "picture.png")
    picture.convert("RGB").save(folder / "a, b=c.JPG", "JPEG")
    wide = (np.arange(4096).reshape(64, 64) * 16).astype(np.uint16)
    found = {
        "1 x 1": Question([Image.new("RGB", (1, 1))]),
        "1 x 300": Question([Image.new("RGB", (1, 300))]),
        "900 x 1": Question([Image.new("RGB", (900, 1), "blue")]),
        "3 x 3": Question([Image.new("RGB", (3, 3), "red")]),
        "16-bit grey": Question([Image.fromarray(wide)]),
        "floats": Question([Image.fromarray(wide.astype(np.float32))]),
        "transparent": Question([picture.convert("RGBA")]),
        "no list": Question(picture),
        "a list in a list": Question([[picture]]),
        "cut off": Question([{"bytes": picture_bytes(picture)[:-2000], "path": None}]),
        "as data sets hold it": Question([{"bytes": picture_bytes(picture), "path": None}]),
        "a path": Question([str(folder / "picture.png")]),
        "a path with a comma": Question([folder / "a, b=c.JPG"]),
        "special tokens": Question([picture], question=TOKENS),
        "special tokens alone": Question([], question=TOKENS),
        "nothing": Question(None),
        "three places": Question([picture], question="<image> and <image> and <image>?"),
        "no text": Question([picture], question=""),
        "not finite": Question([Image.fromarray(np.full((9, 9), np.nan, np.float32))], False, "not finite"),
        "no file": Question([str(folder / "missing.png")], False, "there is no file"),
        "text": Question([str(folder / "notes.txt")], False, "notes.txt"),
        "an empty file": Question([str(folder / "empty.png")], False, "empty.png"),
        "a folder": Question([str(folder)], False, "there is no file"),
        "none in a list": Question([picture, None], False, "there is none"),
        "a number": Question([5], False, "a int, want a picture"),
        "a sound": Question([{"array": [0.1], "sampling_rate": 16000}], False, "a dict, want a picture"),
        "an animated picture": Question([Image.open(animation(folder / "x.gif", "GIF"))], False, "animated picture"),
        "a task's mistake": Question(KeyError("image_7"), False, "KeyError: 'image_7'"),
        "a broken video": Question([str(folder / "broken.mp4")], False, "broken.mp4", videos=True),
    }
    for extension, codec in FORMATS.items():
        found[f"a .{extension}"] = Question([clip(folder / f"clip.{extension}", 12, codec)], videos=True)
    for count in (1, 2, 3, 7, 9):
        found[f"{count} frames"] = Question([clip(folder / f"{count}.mp4", count)], videos=True)
    found["an animated GIF"] = Question([animation(folder / "y.GIF", "GIF")], videos=True)
    found["a clip as it is"] = Question([str(CLIP)], videos=True)
    return found


def visuals_of(document):
    if isinstance(document["visuals"], Exception):
        raise document["visuals"]
    return document["visuals"]


def ask(lm, documents, **options):
    """Return the answers to questions, and what was logged."""
    rows = [{"question": each.question, "visuals": each.visuals} for each in documents]
    lm.task_dict = {"test": {"test": rows}}
    requests = asked(rows, "test", visuals_of)
    for request in requests:
        request.args[1].update(options)
    with logged() as log:
        return lm.generate_until(requests), log


def texts(answers):
    return [getattr(answer, "text", answer) for answer in answers]


@pytest.fixture(scope="module")
def mixed(wrapper, tmp_path_factory):
    """Hostile questions among ordinary ones, by name, and the answers to the latter when they are asked alone.

    Videos are unanswerable for a model that takes pictures only.
    """
    rows = wrapper.questions
    found = hostile(tmp_path_factory.mktemp("hostile"), rows[0]["image"])
    if not wrapper.stock:  # it takes pictures only
        for each in found.values():
            if each.videos:
                each.answered, each.words = False, "is no picture, and llava_vtr takes pictures only"
    ordinary = {f"ordinary {n}": Question([rows[n]["image"]], question=rows[n]["question"]) for n in range(6)}
    names = [*[*ordinary][:3], *found, *[*ordinary][3:]]
    alone, _ = ask(wrapper.load("enabled=False", force_simple=True), ordinary.values())
    right = [answer == rows[n]["answer"] for n, answer in enumerate(texts(alone))]
    assert sum(right) >= 5
    return {name: (found | ordinary)[name] for name in names}, texts(alone)


@pytest.mark.parametrize("batch", [1, 8])
def test_each_question_is_answered_or_named_and_costs_no_other(wrapper, mixed, batch):
    documents, alone = mixed
    lm = wrapper.load(f"enabled=False,batch_size={batch}", force_simple=True)
    answers, log = ask(lm, documents.values())
    said = dict(zip(documents, texts(answers), strict=True))
    named = {line.split(": ")[1]: line for line in log.errors}
    for number, (name, each) in enumerate(documents.items()):
        line = named.get(f"task test, question {number}", "")
        assert bool(line) != each.answered, (name, line, said[name])
        assert each.words in line, name
        assert each.answered or said[name] == "", name
    assert [said[f"ordinary {n}"] for n in range(6)] == alone
    count = sum(not each.answered for each in documents.values())
    assert log.errors[-1] == f"{wrapper.name}: {count} of {len(documents)} questions were not answered"
    with_visuals = [each for each in documents.values() if each.answered and each.visuals]
    assert lm.record.samples == len(with_visuals)


def test_pruned_answers_are_those_of_single_questions(wrapper, mixed):
    documents = {name: each for name, each in mixed[0].items() if each.answered}
    single, batched = (
        ask(wrapper.load(f"retain_ratio=0.334,batch_size={batch}", force_simple=True), documents.values())[0]
        for batch in (1, 8)
    )
    assert dict(zip(documents, texts(single), strict=True)) == dict(zip(documents, texts(batched), strict=True))


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("no memory"),
        RuntimeError("CUDA error: an illegal access"),
        PassLostError("the other ranks wait"),
    ],
)
def test_what_concerns_the_model_ends_the_run(wrapper, monkeypatch, error):
    lm = wrapper.load("enabled=False", force_simple=True)

    def fail(*_, **__):
        raise error

    monkeypatch.setattr(lm.model, "generate", fail)
    with pytest.raises(type(error), match=str(error)):
        ask(lm, [Question([wrapper.questions[0]["image"]])])


def test_questions_that_are_asked_again_keep_their_options(wrapper):
    lm = wrapper.load("enabled=False,batch_size=2", force_simple=True)
    rows = [wrapper.questions[number] for number in range(3)]
    ordinary = [Question([row["image"]], question=row["question"]) for row in rows]
    whole = texts(ask(lm, ordinary)[0])
    until = whole[0][1]
    expected = [text.split(until)[0] for text in whole]
    assert expected != whole
    for documents in (ordinary, [*ordinary, Question(KeyError("image"))]):
        assert texts(ask(lm, documents, until=[until])[0])[:3] == expected


def test_a_run_whose_first_questions_all_fail_ends(wrapper, monkeypatch):
    lm = wrapper.load("enabled=False,batch_size=4", force_simple=True)
    monkeypatch.setattr(questions, "GIVE_UP_AFTER", 3)

    def fail(*_, **__):
        raise TypeError("generate() got an unexpected keyword argument")

    monkeypatch.setattr(lm.model, "generate", fail)
    with pytest.raises(SystemExit, match=f"{wrapper.name}: the first 3 questions all failed, the last one: TypeError"):
        ask(lm, [Question([wrapper.questions[0]["image"]])] * 5)


def test_the_order_of_tokens_in_a_text_never_makes_a_place(wrapper):
    lm = wrapper.load("enabled=False", force_simple=True)
    tokens = ("<image>", "<|image_pad|>", "<|vision_start|>", "<s>", "</s>", "<|im", "_end|>", "<", "|>", " ", "a")
    seen = []
    generate = lm.model.generate
    picture = wrapper.questions[0]["image"]

    def counting(*arguments, **options):
        seen.append(lm.record.samples)
        return generate(*arguments, **options)

    lm.model.generate = counting

    @settings(max_examples=15, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
    @given(st.lists(st.sampled_from(tokens), max_size=8).map("".join), st.integers(0, 2))
    def check(text, pictures):
        before = lm.record.samples, lm.record.visual_sum
        one = ask(lm, [Question([picture])], max_new_tokens=1)[1]
        tokens_each = lm.record.visual_sum - before[1]
        _, log = ask(lm, [Question([picture] * pictures, question=text)], max_new_tokens=1)
        assert not one.errors
        assert not log.errors
        assert lm.record.visual_sum - before[1] == tokens_each * (1 + pictures)

    check()
    assert seen


def test_pictures_of_any_mode_size_and_file_name_reach_the_prompt(wrapper, tmp_path):
    lm = wrapper.load("enabled=False", force_simple=True)
    names = st.text(st.characters(exclude_categories=["Cs", "Cc"], exclude_characters="/"), min_size=1, max_size=30)
    sizes = st.tuples(st.integers(1, 300), st.integers(1, 300))

    @settings(max_examples=10, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
    @given(sizes, st.sampled_from(MODES), names, st.sampled_from([*STORED, "x"]), st.sampled_from(["", ".png", ".JPG"]))
    def check(size, mode, name, stored, suffix):
        before = lm.record.samples
        picture = Image.new(mode, size)
        if mode in STORED.get(stored, ()):
            file = tmp_path / f"{name}{suffix}"
            picture.save(file, stored)
            picture = str(file)
        _, log = ask(lm, [Question([picture])], max_new_tokens=1)
        assert not log.errors
        assert lm.record.samples == before + 1

    check()


def evaluate(wrapper, folder, checkpoint, knobs="enabled=False", limit=4):
    """Return the answers of an evaluation with a journal, and what was logged."""
    lm = replace(wrapper, checkpoint=checkpoint).load(f"{knobs},resume_folder={folder}", force_simple=True)
    manager, tasks = task_manager(wrapper.name), [wrapper.task]
    with logged() as log:
        results = simple_evaluate(
            model=lm, tasks=tasks, task_manager=manager, limit=limit, log_samples=True, batch_size=1
        )
    lm.journal.close()
    return [sample["filtered_resps"][0] for sample in results["samples"][wrapper.task]], log.others


def test_answers_of_other_weights_are_not_given_again(wrapper, tmp_path):
    from safetensors.torch import load_file, save_file

    checkpoint = tmp_path / "weights"
    checkpoint.mkdir()
    for file in wrapper.checkpoint.rglob("*"):
        if file.is_file():
            (checkpoint / file.relative_to(wrapper.checkpoint)).parent.mkdir(exist_ok=True)
            (checkpoint / file.relative_to(wrapper.checkpoint)).write_bytes(file.read_bytes())
    answers, _ = evaluate(wrapper, tmp_path / "answers", checkpoint)
    again, log = evaluate(wrapper, tmp_path / "answers", checkpoint)
    assert again == answers
    assert f"{wrapper.name}: no question reached the model: all 4 were answered by an earlier run" in log
    assert not any("samples (means" in line for line in log)
    [weights] = checkpoint.glob("*.safetensors")
    tensors = {name: tensor * 0 for name, tensor in load_file(weights).items()}
    save_file(tensors, weights, {"format": "pt"})
    with logged() as opened:
        others, log = evaluate(wrapper, tmp_path / "answers", checkpoint)
    assert others != answers
    assert any("holds 4 answers of other runs" in line and "other weights" in line for line in opened.others)
    assert any("4 samples (means over samples)" in line for line in log)
    files = [*(tmp_path / "answers").glob("*.jsonl")]
    assert sum(len(file.read_text().splitlines()) for file in files) == 4 + sum(map(bool, others))


def test_look_shows_a_file_as_a_data_set_does(wrapper, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    picture = wrapper.questions[0]["image"].convert("RGB")
    stream = io.BytesIO()
    picture.rotate(90, expand=True).save(stream, "PNG", exif=exif)
    (tmp_path / "turned.png").write_bytes(stream.getvalue())
    lm = wrapper.load("enabled=False", force_simple=True)
    question = wrapper.questions[0]["question"]
    as_file, upright = ([Question([each], question=question)] for each in (str(tmp_path / "turned.png"), picture))
    assert texts(ask(lm, as_file)[0]) == texts(ask(lm, upright)[0]) == [wrapper.questions[0]["answer"]]


def test_totals_are_json(wrapper, tmp_path):
    answers, _ = evaluate(wrapper, tmp_path, wrapper.checkpoint, limit=1)
    [file] = tmp_path.glob("*.settings.json")
    stored = json.loads(file.read_text())
    assert {"code", "weights", "torch", "transformers", "lmms-eval", "pillow", "strategy"} <= set(stored)
    assert answers
