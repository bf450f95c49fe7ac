"""LLaVA split over two and three processes."""

import pytest
from tensor_parallel_checks import *  # noqa: F403
from tensor_parallel_checks import part
from test_fast import small


@pytest.fixture(scope="module", params=[2, 3])
def parted(request, tmp_path_factory):
    return part(small, request.param, tmp_path_factory.mktemp("ranks"))
