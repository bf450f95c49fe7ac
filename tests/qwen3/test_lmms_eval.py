"""The lmms-eval model qwen3_vl_vtr."""

import pytest
from qwen_lmms_checks import *  # noqa: F403
from qwen_lmms_checks import Wrapper

import train_qwen3


@pytest.fixture(scope="session")
def wrapper(tmp_path_factory) -> Wrapper:
    folder = tmp_path_factory.mktemp("untrained")
    student = train_qwen3.Qwen3Student(train_qwen3.load_processor(folder / "tokenizer"))
    student.export(folder / "checkpoint")
    return Wrapper("qwen3_vl_vtr", "qwen3_vl", folder / "checkpoint", student.cell)


def test_the_chat_and_the_simple_form_give_the_same_answers(wrapper):
    chat, simple = (wrapper.load("retain_ratio=0.334", force_simple=simple) for simple in (False, True))
    assert (chat.is_simple, simple.is_simple) == (False, True)
    assert answers(chat, wrapper.name) == answers(simple, wrapper.name)  # noqa: F405
