"""vLLM in the test's own process, so that tests see what it keeps."""

import os

import pytest

# Before vLLM is imported.
os.environ |= {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_USE_V2_MODEL_RUNNER": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "TRITON_INTERPRET": "1",
}


@pytest.fixture(scope="session")
def folders(tmp_path_factory):
    """The folder of a family's checkpoint."""
    from engines import checkpoint

    made = {}

    def folder(family):
        return made.setdefault(family, made.get(family) or checkpoint(family, tmp_path_factory.mktemp(family)))

    return folder
