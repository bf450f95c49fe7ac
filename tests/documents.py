"""What the documents tell people to type."""

import re
import shlex
from pathlib import Path

ROOT = Path(__file__).parents[1]
DOCUMENTS = [
    ROOT / "README.md",
    ROOT / "image/LLaVA/README.md",
    ROOT / "image/Qwen2-VL/README.md",
    ROOT / "image/Qwen3-VL/README.md",
    ROOT / "video/Video-LLaVA/README.md",
    ROOT / "examples/shapes/README.md",
    ROOT / "docs/INPUTS.md",
    ROOT / "docs/ADDING_A_STRATEGY.md",
    ROOT / "docs/BENCHMARKS.md",
    ROOT / "docs/SCALING.md",
]


def blocks(language: str) -> list[tuple[Path, str]]:
    """Every block of a language, with its document."""
    return [
        (document, block)
        for document in DOCUMENTS
        for kind, block in re.findall(r"^```(\w*)\n(.*?)^```$", document.read_text(), re.MULTILINE | re.DOTALL)
        if kind == language
    ]


COMMANDS = [
    (document.relative_to(ROOT), shlex.split(line))
    for document, block in blocks("")
    for line in block.replace("\\\n", " ").splitlines()
    for line in line.split("&&")
]


def evaluations(model: str) -> list[list[str]]:
    """The arguments of each documented lmms-eval run of a model."""
    found = [
        words[words.index("lmms_eval") + 1 :]
        for _, words in COMMANDS
        if "lmms_eval" in words and words[words.index("lmms_eval") + 1 :][:2] == ["--model", model]
    ]
    assert found
    return found


def commands(name: str) -> list[list[str]]:
    """Each documented command that nox is given for a backbone's session, such as compare."""
    found = [words for _, words in COMMANDS if words[0] == "nox" and name in words]
    assert found
    return found


def launches(script: str) -> list[list[str]]:
    """The arguments that `accelerate launch` is given in each documented command for a script or module."""
    found = [words[words.index("launch") + 1 :] for _, words in COMMANDS if "launch" in words and script in words]
    assert found
    return found
