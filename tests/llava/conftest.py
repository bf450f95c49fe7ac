"""LLaVA's tiny decoder for the shared engine checks, and lmms-eval's command line."""

import sys

import libyaml  # noqa: F401
import pytest
from engine_checks import Family
from llama_checks import llama
from lmms_eval.cli import dispatch
from loguru import logger

import llava  # noqa: F401  registers the backbone


@pytest.fixture(scope="session")
def family() -> Family:
    return llama("llava", "llama_192")


@pytest.fixture
def lmms_eval(monkeypatch, capfd):
    """Runs lmms-eval's command line here, which is there sooner than a process; its exit status and what it said."""

    def run(*words):
        monkeypatch.setattr(sys, "argv", ["lmms_eval", *map(str, words)])
        status, last = 0, ""
        try:
            dispatch.main()
        except SystemExit as stop:
            status, last = (stop.code or 0, "") if isinstance(stop.code, int | None) else (1, stop.code)
        return status, "".join((*capfd.readouterr(), last))

    yield run
    logger.remove()  # what lmms-eval adds writes to what is captured
