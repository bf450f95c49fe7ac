"""Qwen3-VL split over two processes, which its two key heads allow."""

import pytest
from qwen_fast_checks import small
from tensor_parallel_checks import *  # noqa: F403
from tensor_parallel_checks import part

import qwen3_vl_vtr  # noqa: F401  registers the backbone, in each process


def build(device):
    return small("shapes-qwen3", device)


@pytest.fixture(scope="module")
def parted(tmp_path_factory):
    return part(build, 2, tmp_path_factory.mktemp("ranks"))
