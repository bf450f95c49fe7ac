import pytest
from comparison_checks import *  # noqa: F403
from comparison_checks import PICTURE, QUESTION, Asked


@pytest.fixture
def asked():
    more = "enable_thinking=False"
    return Asked("qwen3_5_vtr", "shapes-qwen3_5", "shapes_varied", PICTURE, QUESTION, more=more)
