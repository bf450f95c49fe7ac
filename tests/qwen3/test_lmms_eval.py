"""The lmms-eval model qwen3_vl_vtr."""

import pytest
from lmms_checks import *  # noqa: F403
from qwen_lmms_checks import *  # noqa: F403
from qwen_lmms_checks import Wrapper, qwen


@pytest.fixture(scope="session")
def wrapper() -> Wrapper:
    return qwen("qwen3_vl_vtr", "qwen3_vl", "shapes-qwen3", 32)


def test_the_chat_and_the_simple_form_give_the_same_answers(wrapper):
    chat, simple = (wrapper.load("retain_ratio=0.334", force_simple=simple) for simple in (False, True))
    assert (chat.is_simple, simple.is_simple) == (False, True)
    assert wrapper.answers(chat, 6) == wrapper.answers(simple, 6)
