"""What a pruned Video-LLaVA refuses, and what it leaves unpruned."""

import pytest
import torch
from llama_unsupported_checks import *  # noqa: F403
from llama_unsupported_checks import Asked, asked_of

from videollava.model.builder import load_pretrained_model


@pytest.fixture(scope="module")
def loaded(checkpoint):
    return load_pretrained_model(str(checkpoint), device="cpu")


@pytest.fixture
def asked(loaded) -> Asked:
    video = torch.randn(3, 8, 224, 224, generator=torch.Generator().manual_seed(0))
    return asked_of(loaded[1], [video], frames=8)
