"""Every environment and every check: `nox -l` lists them, plain `nox` runs all that test something."""

import os
import shutil
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
CHECKPOINTS = "examples/shapes/checkpoints"


@dataclass(frozen=True)
class Backbone:
    """Where a backbone of lmms-eval's lives, what it is called there, and on what it is tried.

    checkpoint: the small one shipped here; task: the questions it is asked; more: further arguments of the model.
    """

    folder: str
    tests: str
    model: str
    checkpoint: str
    task: str
    more: str = ""


BACKBONES = {
    "llava": Backbone("image/LLaVA", "tests/llava", "llava_vtr", f"{CHECKPOINTS}/shapes-llava", "shapes"),
    "qwen2": Backbone("image/Qwen2-VL", "tests/qwen2", "qwen2_vl_vtr", f"{CHECKPOINTS}/shapes-qwen2", "shapes_varied"),
    "qwen3": Backbone("image/Qwen3-VL", "tests/qwen3", "qwen3_vl_vtr", f"{CHECKPOINTS}/shapes-qwen3", "shapes_varied"),
    # All models of today share an environment; one of them is evaluated, which has not learned to think.
    "current": Backbone(
        "image/Current",
        "tests/current",
        "qwen3_5_vtr",
        f"{CHECKPOINTS}/shapes-qwen3_5",
        "shapes_varied",
        "enable_thinking=False",
    ),
}

VIDEO = "video/Video-LLaVA"
VLLM = "serving/vllm"
NEWEST_VLLM = "serving/vllm/newest"
# Model Runner V2 without a GPU: see serving/vllm/without_gpu.
ON_CPU = {"TRITON_INTERPRET": "1", "VLLM_USE_V2_MODEL_RUNNER": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
DEMO = ("--budgets", "192,128,64", "--output", "results/demo")
FULL = "--full"  # every row of each matrix of tests
COMMANDS = ("compare", "look")  # of the package comparison, told which model and weights
SPEED = "speed"  # the benchmark, told which backbone
# A file to a worker, so that what its tests share is built once.
PYTEST = ("pytest", "-n", "2", "--dist", "loadfile", "--no-loadscope-reorder")
QUICK = ("engine", "hostile", "model")  # the tests of one backbone that start no process

nox.options.sessions = ["lint", "strategy", *BACKBONES, "video", "vllm", "vllm_newest"]


def own_packages(folder: str) -> dict[str, str]:
    """Names and folders of the packages of this repository that the project in a folder depends on."""
    sources = nox.project.load_toml(f"{folder}/pyproject.toml").get("tool", {}).get("uv", {}).get("sources", {})
    return {name: os.path.normpath(f"{folder}/{source['path']}") for name, source in sources.items()}


def install(session: nox.Session, folder: str) -> None:
    """Install the locked versions and, editable, this repository's own packages."""
    session.install("--no-deps", "-r", f"{folder}/{LOCK}")
    packages = [*own_packages(folder).values(), folder]
    if "build-system" not in nox.project.load_toml(f"{folder}/pyproject.toml"):
        packages.remove(folder)  # an environment only
    session.install("--no-deps", *(part for path in packages for part in ("-e", path)))
    # Where a container forbids byte code, each of the many processes that tests start would compile torch anew.
    session.env["PYTHONDONTWRITEBYTECODE"] = ""


def check(session: nox.Session, *words: str) -> None:
    """Run tests by two workers of one thread each, as many as there are cores in CI."""
    session.run(*PYTEST, *words, env={"OMP_NUM_THREADS": "1"})


def tested(session: nox.Session, folder: str, tests: str, model: str, checkpoint: str, more: str) -> bool:
    """Install a backbone and run its tests, with options for pytest after `--`; or the command after `--`.

    Returns:
        Whether all tests were run.
    """
    install(session, folder)
    first = session.posargs[0] if session.posargs else "-"
    if first.startswith("-"):
        check(session, tests, *session.posargs)
    elif first == SPEED:
        session.run("python", "-m", "benchmarks.speed", "--backbone", session.name, *session.posargs[1:])
    elif first in COMMANDS:
        command(session, model, checkpoint, more, *session.posargs)
    else:
        session.run(*session.posargs, external=True)
    return session.posargs in ([], [FULL])


def command(session: nox.Session, model: str, checkpoint: str, more: str, name: str, *arguments: str) -> None:
    """Run a command of the package comparison on a small checkpoint, or on the weights that the arguments name."""
    asked = ["--model", model, "--pretrained", checkpoint, "--include_path", TASKS]
    small = not any(argument.startswith("--pretrained") for argument in arguments)
    asked += [f"--model_args={more}"] if more and small else []
    session.run("python", "-m", f"comparison.{name}", *asked, *arguments)


def backbone(row: Backbone) -> Callable[[nox.Session], None]:
    """The session of one backbone."""

    def run(session: nox.Session) -> None:
        """Test a backbone and evaluate its small checkpoint on a few questions, or run the command after `--`."""
        if not tested(session, row.folder, row.tests, row.model, row.checkpoint, row.more):
            return
        arguments = ",".join(filter(None, [f"pretrained={row.checkpoint},strategy=clse,keep_tokens=192", row.more]))
        command = ["python", "-m", "lmms_eval", "--model", row.model, "--model_args", arguments]
        task = ["--tasks", row.task, "--include_path", TASKS, "--limit", "20", "--batch_size", "1"]
        session.run(*command, *task, "--output_path", str(RESULTS / session.name))

    return run


for name, row in BACKBONES.items():
    nox.session(backbone(row), name=name, python=PYTHON)


@nox.session(python=PYTHON)
def video(session: nox.Session) -> None:
    """Test Video-LLaVA and its script, unpruned and at two budgets, or run the command after `--`."""
    if not tested(session, VIDEO, "tests/video", "videollava", f"{CHECKPOINTS}/shapes-video", ""):
        return
    output = (RESULTS / session.name).absolute()
    shutil.rmtree(output, ignore_errors=True)  # what lies there would be gone on with, not answered anew
    clips, script = "../../examples/shapes/clips_test", "videollava/eval/video"
    command = ["python", f"{script}/run_inference_video_qa.py", "--model_path", f"../../{CHECKPOINTS}/shapes-video"]
    command += ["--video_dir", f"{clips}/videos", "--gt_file_question", f"{clips}/test_q.json"]
    command += ["--gt_file_answers", f"{clips}/test_a.json", "--output_dir", str(output), "--num_samples", "20"]
    with session.chdir(VIDEO):
        for name, options in {
            "unpruned": [],
            "clse_194": ["--vtr_keep_tokens", "194"],
            "clse_64": ["--vtr_keep_tokens", "64"],
        }.items():
            pruned = ["--vtr_enabled", "--vtr_strategy", "clse", *options] if options else []
            session.run(*command, "--output_name", name, *pruned)
            session.run("python", f"{script}/eval_video_qa.py", "--pred_path", f"{output}/{name}.json")


@nox.session(python=PYTHON)
def vllm(session: nox.Session) -> None:
    """Test the plug-in of vLLM on the CPU, or run the command after `--` where vLLM runs on the CPU."""
    on_cpu(session, VLLM)


@nox.session(python=PYTHON)
def vllm_newest(session: nox.Session) -> None:
    """The same with the newest vLLM that the plug-in is tested with."""
    on_cpu(session, NEWEST_VLLM)


def on_cpu(session: nox.Session, folder: str) -> None:
    """Test the plug-in with the vLLM that a folder locks, or run the command after `--` there."""
    install(session, folder)
    session.env.update(ON_CPU)
    if session.posargs and not session.posargs[0].startswith("-"):
        session.run(*session.posargs, external=True)
    else:
        check(session, "tests/vllm", *session.posargs)


@nox.session(python=PYTHON)
def strategy(session: nox.Session) -> None:
    """Test the package `strategy` with nothing but torch, and the tables and reports of `comparison`."""
    install(session, ".")
    check(session, "tests/strategy", "tests/comparison", *session.posargs)


@nox.session(python=PYTHON)
def lint(session: nox.Session) -> None:
    """Check style and types."""
    install(session, ".")
    session.run("ruff", "check")
    session.run("ruff", "format", "--check")
    session.run("mypy")


@nox.session(python=False)
def quick(session: nox.Session) -> None:
    """Check style and types, and run the tests that take a few minutes."""
    session.notify("lint")
    session.notify("strategy", ["-m", "not processes"])
    session.notify("llava", ["-k", " or ".join(f"test_{name}.py" for name in QUICK)])


@nox.session(python=False)
def full(session: nox.Session) -> None:
    """Run what plain `nox` runs, with every row of each matrix of tests."""
    for name in nox.options.sessions:
        session.notify(name, [FULL])


@nox.session(python=PYTHON)
def demo(session: nox.Session) -> None:
    """Evaluate a small checkpoint unpruned and at three budgets; `-- BACKBONE` picks another than llava."""
    row = BACKBONES[session.posargs[0] if session.posargs else "llava"]
    install(session, row.folder)
    command(session, row.model, row.checkpoint, row.more, "compare", "--strategies", "clse", *DEMO, "--tasks", row.task)


@nox.session(python=False)
def lock(session: nox.Session) -> None:
    """Resolve every environment anew and write its lock file."""
    for folder in (".", *(row.folder for row in BACKBONES.values()), VIDEO, VLLM, NEWEST_VLLM):
        groups = ["--group", "test", "--group", "compare"] + ["--group", "lint"] * (folder == ".")
        own = [part for name in own_packages(folder) for part in ("--no-emit-package", name)]
        with session.chdir(folder):
            session.run(
                *("uv", "pip", "compile", "pyproject.toml", *groups, "--all-extras", "--python-version", PYTHON),
                *("--universal", "--upgrade", "--no-header", "--no-annotate", *own, "-o", LOCK, "--quiet"),
                external=True,
            )
