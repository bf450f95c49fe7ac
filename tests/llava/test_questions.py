"""Questions of any kind, asked through lmms-eval."""

import pytest
from ahead_checks import *  # noqa: F403
from batch_checks import *  # noqa: F403
from lmms_checks import CHECKPOINTS, Wrapper
from question_checks import *  # noqa: F403


@pytest.fixture(scope="module")
def wrapper() -> Wrapper:
    return Wrapper("llava_vtr", CHECKPOINTS / "shapes-llava", "shapes")
