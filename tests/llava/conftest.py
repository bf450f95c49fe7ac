"""LLaVA's tiny decoder for the shared engine checks."""

import pytest
from engine_checks import Family
from llama_checks import llama

import llava  # noqa: F401  registers the backbone


@pytest.fixture(scope="session")
def family() -> Family:
    return llama("llava", "llama_192")
