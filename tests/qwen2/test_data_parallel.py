"""The lmms-eval model qwen2_vl_vtr in several processes."""

import pytest
from data_parallel_checks import *  # noqa: F403
from data_parallel_checks import go_on
from lmms_checks import Wrapper
from qwen_lmms_checks import qwen


@pytest.fixture(scope="session")
def wrapper() -> Wrapper:
    return qwen("qwen2_vl_vtr", "qwen2_vl", "shapes-qwen2", 28)


@pytest.mark.parametrize(("question", "then", "more"), [(3, 2, "tensor_parallel=2"), (1, 3, "zero_stage=3")])
def test_they_go_on_too_where_processes_share_a_model(wrapper, single, tmp_path, question, then, more):
    go_on(wrapper, single[0], tmp_path, question, then, more)
