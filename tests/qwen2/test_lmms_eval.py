"""The lmms-eval model qwen2_vl_vtr."""

import pytest
from lmms_checks import *  # noqa: F403
from qwen_lmms_checks import *  # noqa: F403
from qwen_lmms_checks import Wrapper, qwen


@pytest.fixture(scope="session")
def wrapper() -> Wrapper:
    return qwen("qwen2_vl_vtr", "qwen2_vl", "shapes-qwen2", 28)
