"""vLLM in the test's own process, so that tests see what it keeps."""

import os
from functools import cache

import pytest

# Before vLLM is imported; noxfile.py has what the CPU needs besides.
os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"


@pytest.fixture(scope="session")
def folders(tmp_path_factory):
    """The folder of a family's checkpoint."""
    from engines import checkpoint

    return cache(lambda family: checkpoint(family, tmp_path_factory.mktemp(family)))
