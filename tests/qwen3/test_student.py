"""The training of shapes-qwen3."""

import pytest
from qwen_student_checks import *  # noqa: F403

import train_qwen3


@pytest.fixture
def student():
    return lambda folder: train_qwen3.Qwen3Student(train_qwen3.load_processor(folder))
