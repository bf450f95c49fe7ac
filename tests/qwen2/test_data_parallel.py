"""The lmms-eval model qwen2_vl_vtr in several processes."""

import pytest
from data_parallel_checks import *  # noqa: F403
from lmms_checks import Wrapper
from qwen_lmms_checks import qwen


@pytest.fixture(scope="session")
def wrapper() -> Wrapper:
    return qwen("qwen2_vl_vtr", "qwen2_vl", "shapes-qwen2", 28)
