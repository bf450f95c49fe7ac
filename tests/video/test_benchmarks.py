"""The model of real size that the benchmarks ask, in its small size."""

import pytest
from benchmark_checks import *  # noqa: F403

from benchmarks.answers import vision_parts


@pytest.fixture(scope="module")
def backbone_name() -> str:
    return "video"


def test_the_floor_of_vision_leaves_out_the_tower_of_pictures(case):
    assert vision_parts(case) == [case.model.model.video_tower, case.model.model.mm_projector]
