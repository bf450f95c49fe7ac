"""Checkpoints of Video-LLaVA."""

import pytest
from checkpoint_checks import *  # noqa: F403

from videollava.model.builder import load_pretrained_model


@pytest.fixture(scope="session")
def load():
    return lambda folder: load_pretrained_model(str(folder), device="cpu")[1].state_dict()
