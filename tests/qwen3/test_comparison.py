import pytest
from comparison_checks import *  # noqa: F403
from comparison_checks import PICTURE, QUESTION, Asked


@pytest.fixture
def asked():
    return Asked("qwen3_vl_vtr", "shapes-qwen3", "shapes_varied", PICTURE, QUESTION)
