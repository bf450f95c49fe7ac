"""LLaVA split over three processes; the Qwens' heads are split over two."""

import pytest
from tensor_parallel_checks import *  # noqa: F403
from tensor_parallel_checks import part
from test_fast import small


@pytest.fixture(scope="module")
def parted(tmp_path_factory):
    return part(small, 3, tmp_path_factory.mktemp("ranks"))
