"""LLaVA split over three processes; the Qwens' heads are split over two."""

import pytest
from several import part
from tensor_parallel_checks import *  # noqa: F403
from tensor_parallel_checks import work
from test_fast import small


@pytest.fixture(scope="module")
def parted(tmp_path_factory):
    return part(work, small, 3, tmp_path_factory.mktemp("ranks"))
