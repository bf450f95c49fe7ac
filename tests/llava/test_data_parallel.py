"""The lmms-eval model llava_vtr in several processes, and one that hangs."""

import pytest
from data_parallel_checks import *  # noqa: F403
from data_parallel_checks import FAULTY, evaluation
from launching import launched, run
from lmms_checks import CHECKPOINTS, Wrapper


@pytest.fixture(scope="session")
def wrapper() -> Wrapper:
    return Wrapper("llava_vtr", CHECKPOINTS / "shapes-llava", "shapes")


@pytest.mark.parametrize(("count", "more"), [(2, ()), (2, ("zero_stage=3",)), (3, ("tensor_parallel=3",))])
def test_a_process_that_hangs_is_named_and_all_stop(wrapper, tmp_path, count, more):
    done = run(launched(count, FAULTY, "hang", 1, 1, "lmms_eval", *evaluation(wrapper, tmp_path, *more)), wait=15)
    assert done.returncode == 1
    assert done.stderr.count("rank 1: nothing done for 15 seconds, so all ranks stop") == 1
    assert not list(tmp_path.rglob("*_results.json"))
