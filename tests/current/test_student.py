"""The training of shapes-qwen3_5."""

import pytest
from qwen_student_checks import *  # noqa: F403

import train_qwen3_5


@pytest.fixture
def student():
    return lambda folder: train_qwen3_5.Qwen35Student(train_qwen3_5.load_processor(folder))


@pytest.fixture
def few_layers(monkeypatch):
    """Three linear layers and one of attention."""
    monkeypatch.setitem(train_qwen3_5.DECODER, "num_hidden_layers", 4)
