"""The training of shapes-qwen2."""

import pytest
from qwen_student_checks import *  # noqa: F403

import train_qwen2


@pytest.fixture
def student():
    return lambda folder: train_qwen2.Qwen2Student(train_qwen2.load_processor(folder))
