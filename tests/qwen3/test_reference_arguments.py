"""Command lines of PriorTR with qwen3_vl_vtr."""

import pytest
from qwen_lmms_checks import Wrapper, qwen
from qwen_reference_checks import *  # noqa: F403


@pytest.fixture(scope="session")
def wrapper() -> Wrapper:
    return qwen("qwen3_vl_vtr", "qwen3_vl", "shapes-qwen3", 32)
