"""Questions of any kind, asked through lmms-eval."""

import pytest
from lmms_checks import CHECKPOINTS
from question_checks import *  # noqa: F403
from question_checks import Wrapper


@pytest.fixture(scope="module")
def wrapper() -> Wrapper:
    return Wrapper("llava_vtr", CHECKPOINTS / "shapes-llava", "shapes")
