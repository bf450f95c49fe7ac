"""Questions of any kind, asked through lmms-eval."""

import pytest
from ahead_checks import *  # noqa: F403
from batch_checks import *  # noqa: F403
from lmms_checks import Wrapper
from question_checks import *  # noqa: F403
from qwen_lmms_checks import qwen
from qwen_question_checks import *  # noqa: F403


@pytest.fixture(scope="module")
def wrapper() -> Wrapper:
    return qwen("qwen2_vl_vtr", "qwen2_vl", "shapes-qwen2", 28)
