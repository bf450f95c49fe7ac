"""Pictures of the Qwens on transformers 5.24 that stay bytes until they move to the model's device."""

import pytest
from qwen_colour_checks import *  # noqa: F403
from qwen_colour_checks import processors_of


@pytest.fixture(scope="module")
def processors():
    return processors_of("shapes-qwen3_5")
