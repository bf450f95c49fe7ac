"""The model of real size that the benchmarks ask, in its small size."""

import pytest
from benchmark_checks import *  # noqa: F403


@pytest.fixture(scope="module")
def backbone_name() -> str:
    return "llava"
