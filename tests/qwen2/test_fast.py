"""The fast path of Qwen2-VL, on its small checkpoint."""

import pytest
from qwen_fast_checks import *  # noqa: F403
from qwen_host_checks import *  # noqa: F403


@pytest.fixture(scope="module")
def checkpoint_name():
    return "shapes-qwen2"
