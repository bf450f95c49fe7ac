"""What the Qwen wrappers owe to visuals that the stock wrappers would leave out of the prompt.

The tests of a backbone import everything from here and give a fixture `wrapper`, a `lmms_checks.Wrapper`.
"""

import pytest
from lmms_eval.api.instance import Instance
from lmms_eval.api.task import ConfigurableMessagesTask
from PIL import Image
from question_checks import Question, ask, hostile, logged, texts


def test_a_prompt_that_lost_its_visuals_is_named(wrapper, monkeypatch):
    lm = wrapper.load("enabled=False,batch_size=2", force_simple=True)
    lost, prepare = Image.new("RGB", (7, 7)), type(lm).prepare_picture

    def prepare_or_lose(self, picture):
        return object() if picture.size == lost.size else prepare(self, picture)

    monkeypatch.setattr(type(lm), "prepare_picture", prepare_or_lose)
    picture = wrapper.questions[0]["image"]
    answers, log = ask(lm, [Question([picture]), Question([lost]), Question([picture])])
    assert [bool(answer) for answer in texts(answers)] == [True, False, True]
    assert log.errors[0].endswith("question 1: not answered, none of its visuals is in the prompt")


@pytest.mark.parametrize("batch", [1, 4])
def test_a_question_without_a_place_for_its_picture_is_named(wrapper, batch):
    lm = wrapper.load(f"enabled=False,interleave_visuals=True,batch_size={batch}", force_simple=True)
    rows = wrapper.questions
    pictures, question = [rows[0]["image"], rows[1]["image"]], rows[0]["question"]
    answers, log = ask(
        lm,
        [
            Question(pictures[:1], question=f"<image 1> {question}"),
            Question(pictures[:1], question=question),
            Question(pictures[:1], question=f"<image 2> {question}"),
            Question(pictures[:1], question=f"<image 0> {question}"),
            Question(pictures, question=f"<image 1> {question}"),
            Question([], question=question),
        ],
    )
    assert texts(answers)[0] == rows[0]["answer"]
    assert [bool(answer) for answer in texts(answers)] == [True, False, False, False, True, True]
    assert [line.split(": not answered, ")[0][-1] for line in log.errors[:-1]] == ["1", "2", "3"]
    assert all("none of its 1 visuals is in the prompt" in line for line in log.errors[:-1])
    assert any("has a place <image N> for only 1 of its 2 visuals" in line for line in log.others)


def test_the_chat_form_answers_or_names_as_the_simple_form_does(wrapper, tmp_path):
    lm = wrapper.load("enabled=False")
    if lm.is_simple:
        pytest.skip("this model has no chat form")
    documents = list(hostile(tmp_path, wrapper.questions[0]["image"]).items())
    # lmms-eval makes messages of no other visuals.
    documents = [
        (name, each)
        for name, each in documents
        if isinstance(each.visuals, list) and all(isinstance(v, (str, dict, Image.Image)) for v in each.visuals)
    ]

    def messages(document):
        return ConfigurableMessagesTask._build_user_turn(document.visuals, document.question)

    lm.task_dict = {"test": {"test": [each for _, each in documents]}}
    options = {"max_new_tokens": 4, "temperature": 0, "do_sample": False}
    requests = [
        Instance(
            request_type="generate_until",
            arguments=("", messages, dict(options), number, "test", "test"),
            idx=0,
            metadata={"task": "test", "repeats": 1, "doc_id": number},
        )
        for number in range(len(documents))
    ]
    with logged() as log:
        answers = texts(lm.generate_until(requests))
    named = {int(line.split("question ")[1].split(":")[0]): line for line in log.errors[:-1]}
    for number, (name, each) in enumerate(documents):
        assert (number in named) != each.answered, (name, named.get(number), answers[number])
        assert each.words in named.get(number, ""), name
