import pytest
from comparison_checks import *  # noqa: F403
from comparison_checks import PICTURE, QUESTION, Asked


@pytest.fixture
def asked():
    return Asked("qwen2_vl_vtr", "shapes-qwen2", "shapes_varied", PICTURE, QUESTION)
