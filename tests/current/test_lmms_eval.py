"""The lmms-eval models of image/Current: the record shows the prune, and the answers are those of Python."""

import functools
import sys

import pytest
import torch
from ahead_checks import requests, watch
from current_checkpoints import save
from lmms_checks import CHECKPOINTS, ROOT, Wrapper
from lmms_eval.api.instance import Instance
from lmms_eval.models import get_model
from question_checks import Question, texts
from transformers import AutoModelForImageTextToText

import strategy
from comparison import look
from strategy.evaluation.batch_size import LARGEST
from strategy.evaluation.turns import Turn

# The models with the family whose tiny checkpoint they load, and the forms they have.
MODELS = {
    "qwen2_5_vl_vtr": ("qwen2_5_vl", (True, False)),
    "qwen3_5_vtr": ("qwen3_5", (True, False)),
    "internvl_vtr": ("internvl3", (False,)),
    "gemma3_vtr": ("gemma3", (True,)),
    "llava_hf_vtr": ("llava_hf", (True, False)),
    "llava_next_vtr": ("llava_next", (True, False)),
    "llava_onevision_vtr": ("llava_onevision", (True, False)),
}
FORMS = [(name, simple) for name, (_, forms) in MODELS.items() for simple in forms]
ONE_BY_ONE = ("internvl_vtr", "llava_hf_vtr", "llava_next_vtr", "llava_onevision_vtr")
QUESTIONS = 2
PRUNE = {"strategy": "fastv", "prune_layer": 4}


def budget(name):
    """What is kept; on LLaVA-1.5 a number of tokens, where a ratio would mean one of 576."""
    return {"keep_tokens": 10} if name == "llava_hf_vtr" else {"retain_ratio": 0.4}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    @functools.cache
    def made(name):
        path = tmp_path_factory.mktemp(name)
        save(name, path)
        return path

    return made


def load(folder, name, simple, **more):
    knobs = ",".join(f"{key}={value}" for key, value in (PRUNE | budget(name) | more).items())
    arguments = f"pretrained={folder(MODELS[name][0])},device=cpu,{knobs}"
    return get_model(name, force_simple=simple).create_from_arg_string(arguments)


def messages(document):
    content = [{"type": "image", "url": document["image"]}, {"type": "text", "text": document["question"]}]
    return [{"role": "user", "content": content}]


def ask(lm):
    """Answers to the first questions about small pictures, in the form that the model takes."""
    rows = Wrapper("", CHECKPOINTS, "shapes_varied").questions.select(range(QUESTIONS))
    documents = [{"question": row["question"], "image": row["image"].resize((60, 44))} for row in rows]
    lm.task_dict, options = {"test": {"test": documents}}, {"max_new_tokens": 6, "temperature": 0, "do_sample": False}
    requests = []
    for number, document in enumerate(documents):
        places = (number, "test", "test")
        simple = (document["question"], dict(options), lambda document: [document["image"]], *places)
        arguments = simple if lm.is_simple else (document["question"], messages, dict(options), *places)
        data = {"task": "test", "repeats": 1, "doc_id": number}
        requests.append(Instance(request_type="generate_until", arguments=arguments, idx=0, metadata=data))
    return [getattr(answer, "text", answer) for answer in lm.generate_until(requests)]


@pytest.mark.parametrize(("name", "simple"), FORMS)
def test_the_record_shows_the_prune_and_the_answers_are_those_of_python(folder, name, simple):
    lm, seen, decoded = load(folder, name, simple), [], []
    stock = lm.model.generate

    def watched(*args, **kwargs):
        ids = stock(*args, **kwargs)
        seen.append(kwargs)
        decoded.append(ids)
        return ids

    lm.model.generate = watched
    answers = ask(lm)
    assert (lm.record.samples, lm.totals.unanswered) == (QUESTIONS, 0)
    [before], [after] = ([stage.before for stage in lm.record.stages], [stage.after for stage in lm.record.stages])
    assert 0 < after < before
    model = AutoModelForImageTextToText.from_pretrained(folder(MODELS[name][0]), dtype=torch.float32).eval()
    with strategy.prune(model, strategy.VTRConfig(**PRUNE, **budget(name))) as run:
        for kwargs, theirs in zip(seen, decoded, strict=True):
            own = {
                key: value.float() if torch.is_tensor(value) and value.is_floating_point() else value
                for key, value in kwargs.items()
            }
            assert torch.equal(model.generate(**own), theirs)
    assert run.samples == QUESTIONS
    assert len(answers) == QUESTIONS


@pytest.mark.parametrize("name", ["internvl_vtr", "gemma3_vtr", "llava_hf_vtr"])
def test_a_wrapper_that_answers_one_by_one_takes_no_larger_batch(folder, name):
    simple = MODELS[name][1][0]
    lm = load(folder, name, simple, batch_size="auto")
    assert (lm.batches.is_auto, lm.batch_size, lm.batch_size_per_gpu) == (True, 1, 1)
    assert lm.batches.most == (1 if name in ONE_BY_ONE else LARGEST)
    if name in ONE_BY_ONE:
        with pytest.raises(SystemExit, match="batch_size=2: allowed is 1 or auto, which is 1 here, since lmms-eval's"):
            load(folder, name, simple, batch_size=2)


@pytest.mark.parametrize(("name", "simple"), FORMS)
def test_what_is_prepared_ahead_has_the_batches_and_the_order_of_the_stock_loop(folder, name, simple, monkeypatch):
    rows = Wrapper("", CHECKPOINTS, "shapes_varied").questions.select(range(5))
    documents = [
        Question([row["image"].resize((60, 44))], question=row["question"] + " Please." * (n % 3))
        for n, row in enumerate(rows)
    ]
    waited, wait = [], Turn.wait
    monkeypatch.setattr(Turn, "wait", lambda turn: waited.append(turn) or wait(turn))
    seen = []
    for workers in (0, 2):
        batch = {} if name in ONE_BY_ONE else {"batch_size": 2}
        lm = load(folder, name, simple, prepare_ahead=workers, **batch)
        asked = watch(lm)
        seen.append((texts(lm.generate_until(requests(lm, documents))), asked, lm.record.kept_sum))
        assert (lm.record.samples, lm.totals.unanswered) == (5, 0)
        assert len(set(waited)) == (len(asked) if workers else 0)
    assert seen[0] == seen[1]


def test_a_failure_that_the_wrapper_only_logs_is_named(folder, caplog):
    lm = load(folder, "llava_hf_vtr", True)

    def fail(*args, **kwargs):
        raise KeyError("in the middle of an answer")

    stock, lm.model.generate = lm.model.generate, None
    lm.model.generate = lambda *args, **kwargs: lm._generate(fail, *args, **kwargs)
    assert ask(lm) == [""] * QUESTIONS
    assert lm.totals.unanswered == QUESTIONS
    assert stock


@pytest.mark.parametrize(
    ("name", "knob", "words"),
    [
        ("internvl_vtr", {"batch_size": 2}, "batch_size=2: allowed is 1"),
        ("llava_hf_vtr", {"nonsense": 2}, "unknown argument 'nonsense'"),
        ("qwen3_5_vtr", {"prune_layer": 99}, "the decoder has 12 layers"),
        ("gemma3_vtr", {"downsample": 64}, "downsample=64: gemma3_vtr cannot resize pictures to that: leave it out"),
        ("gemma3_vtr", {"trust_remote_code": True}, "trust_remote_code=True: code of checkpoints is not run"),
    ],
)
def test_a_wrong_argument_is_one_sentence(folder, name, knob, words):
    with pytest.raises(SystemExit) as stop:
        load(folder, name, MODELS[name][1][0], **knob)
    assert str(stop.value).startswith(f"{name}: ")
    assert words in str(stop.value)


def test_a_checkpoint_of_another_family_is_refused(folder):
    with pytest.raises(SystemExit, match=r"model_type='llava' in config\.json: want 'llava_next'"):
        get_model("llava_next_vtr").create_from_arg_string(f"pretrained={folder('llava_hf')},device=cpu")


def test_qwen3_vl_answers_questions_rightly_on_this_version_too():
    wrapper = Wrapper("qwen3_vl_vtr", CHECKPOINTS / "shapes-qwen3", "shapes_varied", "qwen3_vl", 32)
    lm = wrapper.load("strategy=clse,keep_tokens=192")
    said = wrapper.answers(lm, 12)
    right = [answer == row["answer"] for answer, row in zip(said, wrapper.questions, strict=False)]
    assert sum(right) >= 10
    assert lm.record.samples == 12
    assert lm.record.means()["kept_tokens"][-1] < lm.record.means()["visual_tokens"] / 8


@pytest.mark.parametrize("name", ["internvl_vtr", "llava_next_vtr"])
def test_look_draws_what_was_left_in_either_form(folder, name, monkeypatch, tmp_path):
    picture = tmp_path / "look.png"
    words = ["--model", name, "--pretrained", str(folder(MODELS[name][0])), "--output", str(picture)]
    words += ["--image", str(ROOT / "examples/shapes/picture.jpg"), "--question", "Is there a star?"]
    monkeypatch.setattr(sys, "argv", ["look", *words, "--retain_ratio", "0.334"])
    look.main()
    assert picture.stat().st_size > 0
