"""The lmms-eval model qwen2_vl_vtr."""

from dataclasses import replace

import pytest
from lmms_checks import *  # noqa: F403
from qwen_lmms_checks import *  # noqa: F403
from qwen_lmms_checks import Wrapper, qwen


@pytest.fixture(scope="session")
def wrapper() -> Wrapper:
    # At the published temperature, CLSE drops the objects that this checkpoint is asked about.
    return replace(qwen("qwen2_vl_vtr", "qwen2_vl", "shapes-qwen2", 28), rightly=",clse_temp=100")
