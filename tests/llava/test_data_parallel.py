"""The lmms-eval model llava_vtr in several processes."""

import pytest
from data_parallel_checks import *  # noqa: F403
from lmms_checks import CHECKPOINTS, Wrapper


@pytest.fixture(scope="session")
def wrapper() -> Wrapper:
    return Wrapper("llava_vtr", CHECKPOINTS / "shapes-llava", "shapes")
