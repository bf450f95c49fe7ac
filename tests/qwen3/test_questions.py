"""Questions of any kind, asked through lmms-eval."""

from dataclasses import replace

import pytest
from ahead_checks import *  # noqa: F403
from batch_checks import *  # noqa: F403
from lmms_checks import Wrapper
from question_checks import *  # noqa: F403
from qwen_lmms_checks import qwen
from qwen_question_checks import *  # noqa: F403


@pytest.fixture(scope="module")
def wrapper() -> Wrapper:
    # Else small pictures and the frames of videos would be enlarged to 256 tokens each.
    return replace(qwen("qwen3_vl_vtr", "qwen3_vl", "shapes-qwen3", 32), always=",min_pixels=50176")
