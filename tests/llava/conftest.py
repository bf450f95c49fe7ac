"""LLaVA's tiny decoder for the shared engine checks."""

import pytest
from engine_checks import Family
from transformers import LlamaConfig, LlamaModel

import llava  # noqa: F401  registers the backbone


@pytest.fixture(scope="session")
def family() -> Family:
    return Family("llava", "llama_192", LlamaModel, LlamaConfig)
