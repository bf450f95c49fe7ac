"""The lmms-eval model qwen2_vl_vtr."""

import pytest
from qwen_lmms_checks import *  # noqa: F403
from qwen_lmms_checks import Wrapper

import train_qwen2


@pytest.fixture(scope="session")
def wrapper(tmp_path_factory) -> Wrapper:
    folder = tmp_path_factory.mktemp("untrained")
    student = train_qwen2.Qwen2Student(train_qwen2.load_processor(folder / "tokenizer"))
    student.export(folder / "checkpoint")
    return Wrapper("qwen2_vl_vtr", "qwen2_vl", folder / "checkpoint", student.cell)
