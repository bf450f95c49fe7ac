"""Qwen3-VL sharded over two processes."""

import pytest
from qwen_fast_checks import small
from several import part
from zero_checks import *  # noqa: F403
from zero_checks import work

import qwen3_vl_vtr  # noqa: F401  registers the backbone, in each process


def build(device):
    return small("shapes-qwen3", device)


@pytest.fixture(scope="module")
def sharded(tmp_path_factory):
    return part(work, build, 2, tmp_path_factory.mktemp("ranks"))
