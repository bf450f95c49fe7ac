import pytest
from comparison_checks import *  # noqa: F403
from comparison_checks import PICTURE, QUESTION, Asked


@pytest.fixture
def asked():
    return Asked("llava_vtr", "shapes-llava", "shapes", PICTURE, QUESTION)
