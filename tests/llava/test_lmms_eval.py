"""The lmms-eval model: what people type, what they get, and what they are told when it is wrong."""

import json
import subprocess
import sys

import pytest
import torch
from datasets import Dataset, Features, Image, Value
from lmms_checks import *  # noqa: F403
from lmms_checks import CHECKPOINTS, ENVIRONMENT, LMMS_EVAL, TASKS, Wrapper, measured_is_shown_and_saved
from lmms_eval.api.instance import Instance

CHECKPOINT = CHECKPOINTS / "shapes-llava"
LLAVA = Wrapper("llava_vtr", CHECKPOINT, "shapes")
QUESTIONS = LLAVA.questions
load = LLAVA.load


@pytest.fixture(scope="session")
def wrapper() -> Wrapper:
    return LLAVA


def words(tmp_path, arguments, tasks="shapes"):
    """What is typed behind `lmms_eval`."""
    given = ["--model", "llava_vtr", "--model_args", arguments, "--tasks", tasks, "--include_path", str(TASKS)]
    return [*given, "--limit", "3", "--batch_size", "1", "--output_path", str(tmp_path / "results"), "--log_samples"]


@pytest.mark.parametrize(
    ("knobs", "layers", "kept"),
    [
        ("strategy=clse,keep_tokens=192", (1, 4, 8), (330, 210, 62)),
        ("strategy=clse,keep_tokens=64,prune_layer=[1,5,9],ref_layers=[0]", (1, 5, 9), (110, 70, 20)),
        ("strategy=clse,retain_ratio=0.112,clse_cutoff_ratio=0.2,clse_temp=0.05", (1, 4, 8), (110, 70, 20)),
        ("vtr_strategy=random,vtr_keep_tokens=128,vtr_prune_layer=1;5;9,vtr_ref_layers=0", (1, 5, 9), (220, 140, 41)),
    ],
)
def test_the_knobs_work_as_typed(knobs, layers, kept):
    plan = load(knobs).record.plan
    assert (plan.layers, plan.kept(576)) == (layers, kept)


def test_enabled_false_is_the_unpruned_baseline():
    assert load("enabled=False").record.plan is None


@pytest.mark.parametrize(
    ("knobs", "words"),
    [
        ("keep_token=192", "unknown argument 'keep_token': did you mean 'keep_tokens'"),
        ("keep_tokens=192,retain_ratio=0.3", "give one of the two"),
        ("prune_layer=[1,5,12]", "the decoder has 12 layers"),
        ("conv_template=chatty", "conv_template='chatty': allowed are"),
        ("dtype=float17", "dtype='float17': allowed are"),
        ("prepare_ahead=0.5", "prepare_ahead=0.5: allowed is a whole number from 0 up"),
        ("zero_stage=2", "zero_stage=2: allowed are 0, off, and 3"),
        ("tensor_parallel=2", "tensor_parallel=2: want 2 processes started together or a multiple of it, not 1"),
        ("prune_layer=1;5", "want one number for each of the 2 stages"),
    ],
)
def test_a_wrong_argument_is_one_sentence(knobs, words):
    with pytest.raises(SystemExit) as stop:
        load(knobs)
    assert str(stop.value).startswith("llava_vtr: ")
    assert words in str(stop.value)


def loglikelihoods(lm, asked, documents=QUESTIONS):
    """What a model makes of the targets of questions; asked: number and target."""
    lm.task_dict = {"shapes": {"test": documents}}
    requests = []
    for number, target in asked:
        place = (documents[number]["question"], target, lambda doc: [doc["image"]], number, "shapes", "test")
        metadata = {"task": "shapes", "doc_id": number, "repeats": 1}
        requests.append(Instance(request_type="loglikelihood", arguments=place, idx=0, metadata=metadata))
    return lm.loglikelihood(requests)


def loglikelihood(lm, number, target):
    return loglikelihoods(lm, [(number, target)])[0]


@pytest.mark.parametrize("knobs", ["enabled=False", "keep_tokens=64"])
def test_loglikelihood_agrees_with_generation(knobs):
    generated = LLAVA.answers(load(knobs), 3)
    lm = load(knobs)  # lmms-eval takes a model apart once it has evaluated it
    for number, answer in enumerate(generated):
        loss, greedy = loglikelihood(lm, number, answer)
        assert greedy
        assert all(loss < loglikelihood(lm, number, other)[0] for other in {"yes", "three", "square"} - {answer})


def test_unpruned_loglikelihood_is_the_mean_loss_of_one_forward_call():
    lm = load("enabled=False")
    whole, prompt = (lm._tokenize(QUESTIONS[0]["question"], 1, answer) for answer in ("top-left", None))
    with torch.no_grad():
        logits = lm.model(input_ids=whole[None], images=lm._prepared([QUESTIONS[0]["image"]])).logits[0]
    new = len(whole) - len(prompt)
    expected = torch.nn.functional.cross_entropy(logits[-new - 1 : -1], whole[-new:])
    assert loglikelihood(lm, 0, "top-left")[0] == pytest.approx(float(expected), abs=1e-4)


def test_the_command_line_writes_results_and_says_what_was_kept(tmp_path):
    command = [sys.executable, LMMS_EVAL, *words(tmp_path, f"pretrained={CHECKPOINT},strategy=clse,keep_tokens=192")]
    done = subprocess.run(command, cwd=tmp_path, env=ENVIRONMENT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "prune layers [1, 4, 8], 576 visual tokens kept 330/210/62" in done.stdout
    [results] = (tmp_path / "results").rglob("*results.json")
    saved = json.loads(results.read_text())
    assert saved["results"]["shapes"]["accuracy,none"] >= 0
    measured_is_shown_and_saved(saved, done.stdout)


def test_the_command_line_ends_with_a_sentence_and_no_traceback(tmp_path):
    command = [sys.executable, LMMS_EVAL, *words(tmp_path, f"pretrained={tmp_path},strategy=clse")]
    done = subprocess.run(command, cwd=tmp_path, env=ENVIRONMENT, capture_output=True, text=True, check=False)
    assert done.returncode != 0
    assert f"llava_vtr: {tmp_path}/config.json: missing" in done.stderr
    assert "Traceback" not in done.stderr


def pope(tmp_path, spoil=False):
    """A folder with POPE's schema, in the place where that task looks first."""
    rows = [row for row in QUESTIONS if row["family"] == "exists"][:3]
    text = Value("string")
    columns = {
        "id": [str(n) for n in range(3)],
        "question_id": [str(n) for n in range(3)],
        "question": [row["question"] for row in rows],
        "answer": [row["answer"] for row in rows],
        "image_source": ["shapes"] * 3,
        "image": [row["image"] for row in rows[:2]]
        + [{"bytes": b"no picture", "path": None} if spoil else rows[2]["image"]],
        "category": ["random"] * 3,
    }
    folder = tmp_path / "lmms-lab-encoder/POPE/data"
    folder.mkdir(parents=True)
    features = Features(dict.fromkeys(columns, text) | {"image": Image()})
    Dataset.from_dict(columns, features=features).to_parquet(folder / "test-00000-of-00001.parquet")


def test_a_stock_task_runs_on_a_local_folder_of_its_schema(lmms_eval, monkeypatch, tmp_path):
    pope(tmp_path)
    monkeypatch.chdir(tmp_path)
    done = lmms_eval(*words(tmp_path, f"pretrained={CHECKPOINT},strategy=clse,keep_tokens=192", tasks="pope"))
    assert done.returncode == 0, done.stderr[-2000:]
    [results] = (tmp_path / "results").rglob("*results.json")
    assert "pope_accuracy,none" in json.loads(results.read_text())["results"]["pope"]


def test_an_unreadable_picture_is_named_and_the_other_answers_are_scored(lmms_eval, monkeypatch, tmp_path):
    pope(tmp_path, spoil=True)
    monkeypatch.chdir(tmp_path)
    done = lmms_eval(*words(tmp_path, f"pretrained={CHECKPOINT},strategy=clse,keep_tokens=192", tasks="pope"))
    assert done.returncode == 0, done.stderr[-2000:]
    told = done.stdout + done.stderr
    assert "llava_vtr: task pope, question 2: not answered, its picture is unreadable (cannot identify" in told
    assert "llava_vtr: 1 of 3 questions were not answered" in told
    [samples] = (tmp_path / "results").rglob("*samples_pope.jsonl")
    said = [json.loads(line)["filtered_resps"] for line in samples.read_text().splitlines()]
    assert [bool("".join(answer)) for answer in said] == [True, True, False]


def test_the_loss_of_an_unreadable_picture_is_infinite():
    documents = [QUESTIONS[0], QUESTIONS[1] | {"image": None}]
    (loss, _), unread = loglikelihoods(load("keep_tokens=64"), [(0, "red"), (1, "red")], documents)
    assert loss < float("inf")
    assert unread == (float("inf"), False)


@pytest.mark.parametrize(
    ("until", "expected"), [(["\n\n"], "one\n\ntwo. three"), (["\n\n", "."], "one\n\ntwo"), ("three", "one\n\ntwo.")]
)
def test_a_blank_line_cuts_no_answer(monkeypatch, until, expected):
    lm = load("enabled=False")
    monkeypatch.setattr(lm.tokenizer, "batch_decode", lambda *_, **__: ["one\n\ntwo. three"])
    lm.task_dict = {"test": {"test": [{}]}}
    request = ("What?", {"until": until, "max_new_tokens": 1}, lambda document: [], 0, "test", "test")
    instance = Instance(
        "generate_until", arguments=request, idx=0, metadata={"task": "test", "repeats": 1, "doc_id": 0}
    )
    assert lm.generate_until([instance]) == [expected]
