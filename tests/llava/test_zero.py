"""LLaVA sharded over three processes."""

import pytest
from several import part
from test_fast import small
from zero_checks import *  # noqa: F403
from zero_checks import work


@pytest.fixture(scope="module")
def sharded(tmp_path_factory):
    return part(work, small, 3, tmp_path_factory.mktemp("ranks"))
