"""What a pruned LLaVA refuses, and what it leaves unpruned."""

import pytest
import torch
from llama_unsupported_checks import *  # noqa: F403
from llama_unsupported_checks import Asked, asked_of
from lmms_checks import CHECKPOINTS

from llava.model.builder import load_pretrained_model


@pytest.fixture(scope="module")
def loaded():
    return load_pretrained_model(str(CHECKPOINTS / "shapes-llava"), device="cpu")


@pytest.fixture
def asked(loaded) -> Asked:
    pixels = torch.randn(1, 3, 336, 336, generator=torch.Generator().manual_seed(0))
    return asked_of(loaded[1], pixels, frames=1)
