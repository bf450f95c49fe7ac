"""Command lines of PriorTR with qwen2_vl_vtr."""

import pytest
from qwen_lmms_checks import Wrapper, qwen
from qwen_reference_checks import *  # noqa: F403


@pytest.fixture(scope="session")
def wrapper() -> Wrapper:
    return qwen("qwen2_vl_vtr", "qwen2_vl", "shapes-qwen2", 28)
