"""Every environment and every check: `nox -l` lists them, plain `nox` runs all that test something."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import nox

nox.needs_version = ">=2025.5.1"
nox.options.default_venv_backend = "uv"
nox.options.reuse_venv = "yes"

PYTHON = "3.11"
LOCK = "requirements.lock"
RESULTS = Path("results")
TASKS = "examples/shapes/tasks"


@dataclass(frozen=True)
class Backbone:
    """Where a backbone lives, what lmms-eval calls it, and the small checkpoint it is tried on."""

    folder: str
    tests: str
    model: str
    checkpoint: str


BACKBONES = {
    "llava": Backbone("image/LLaVA", "tests/llava", "llava_vtr", "examples/shapes/checkpoints/shapes-llava"),
}

nox.options.sessions = ["lint", "strategy", *BACKBONES]


def install(session: nox.Session, folder: str) -> None:
    """Install the locked versions and, editable, this repository's own packages."""
    session.install("--no-deps", "-r", f"{folder}/{LOCK}")
    session.install("--no-deps", *(part for path in dict.fromkeys((".", folder)) for part in ("-e", path)))


def backbone(row: Backbone) -> Callable[[nox.Session], None]:
    """The session of one backbone."""

    def run(session: nox.Session) -> None:
        """Test a backbone and evaluate its small checkpoint on a few questions, or run the command after `--`."""
        install(session, row.folder)
        if session.posargs:
            session.run(*session.posargs, external=True)
            return
        session.run("pytest", row.tests)
        arguments = f"pretrained={row.checkpoint},strategy=clse,keep_tokens=192"
        command = ["python", "-m", "lmms_eval", "--model", row.model, "--model_args", arguments]
        task = ["--tasks", "shapes", "--include_path", TASKS, "--limit", "20", "--batch_size", "1"]
        session.run(*command, *task, "--output_path", str(RESULTS / session.name))

    return run


for name, row in BACKBONES.items():
    nox.session(backbone(row), name=name, python=PYTHON)


@nox.session(python=PYTHON)
def strategy(session: nox.Session) -> None:
    """Test the package `strategy` alone, with nothing but torch."""
    install(session, ".")
    session.run("pytest", "tests/strategy")


@nox.session(python=PYTHON)
def lint(session: nox.Session) -> None:
    """Check style and types."""
    install(session, ".")
    session.run("ruff", "check")
    session.run("ruff", "format", "--check")
    session.run("mypy")


@nox.session(python=PYTHON)
def demo(session: nox.Session) -> None:
    """Evaluate a small checkpoint unpruned and at three budgets; `-- BACKBONE` picks another than llava."""
    row = BACKBONES[session.posargs[0] if session.posargs else "llava"]
    install(session, row.folder)
    session.run("python", "examples/shapes/demo.py", "--model", row.model, "--checkpoint", row.checkpoint)


@nox.session(python=False)
def lock(session: nox.Session) -> None:
    """Resolve every environment anew and write its lock file."""
    for folder in (".", *(row.folder for row in BACKBONES.values())):
        groups = ["--group", "test"] + ["--group", "lint"] * (folder == ".")
        with session.chdir(folder):
            session.run(
                *("uv", "pip", "compile", "pyproject.toml", *groups, "--python-version", PYTHON, "--universal"),
                *("--upgrade", "--no-header", "--no-annotate", "--no-emit-package", "strategy", "-o", LOCK, "--quiet"),
                external=True,
            )
