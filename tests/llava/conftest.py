"""LLaVA's tiny decoder for the shared engine checks, and lmms-eval's command line."""

import libyaml  # noqa: F401
import pytest
from engine_checks import Family
from launching import call
from llama_checks import llama
from lmms_eval.cli import dispatch
from loguru import logger

import llava  # noqa: F401  registers the backbone


@pytest.fixture(scope="session")
def family() -> Family:
    return llama("llava", "llama_192")


@pytest.fixture
def lmms_eval(monkeypatch, capfd):
    """Runs lmms-eval's command line in this process."""
    yield lambda *words: call(dispatch.main, ["lmms_eval", *words], monkeypatch, capfd)
    logger.remove()  # what lmms-eval adds writes to what is captured
