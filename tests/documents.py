"""The documents of the repository, and the commands that they show."""

import re
import shlex
from pathlib import Path

ROOT = Path(__file__).parents[1]
READMES = [ROOT / "README.md", *sorted(ROOT.glob("image/*/README.md")), *sorted(ROOT.glob("video/*/README.md"))]
READMES += [*sorted(ROOT.glob("serving/*/README.md")), *sorted(ROOT.glob("examples/*/README.md"))]
DOCS = sorted(ROOT.glob("docs/**/*.md"))
DOCUMENTS = READMES + DOCS


def blocks(language: str) -> list[tuple[Path, str]]:
    """Every block of a language, with its document."""
    return [
        (document, block)
        for document in DOCUMENTS
        for kind, block in re.findall(r"^```(\w*)\n(.*?)^```$", document.read_text(), re.MULTILINE | re.DOTALL)
        if kind == language
    ]


def table(document: Path, header: str) -> list[str]:
    """Return the rows of the one table in a document whose header row begins with a text."""
    lines = document.read_text().splitlines()
    [start] = [number for number, line in enumerate(lines) if line.startswith(header)]
    rows = lines[start + 2 :]
    return rows[: next((number for number, row in enumerate(rows) if not row.startswith("|")), len(rows))]


def anchors(document: Path) -> set[str]:
    """Return the anchors of a document's headings, as GitHub makes them."""
    text = re.sub(r"^```.*?^```$", "", document.read_text(), flags=re.MULTILINE | re.DOTALL)
    found: list[str] = []
    for heading in re.findall(r"^#+ (.*)$", text, re.MULTILINE):
        words = re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")
        found.append(f"{words}-{found.count(words)}" if words in found else words)
    return set(found)


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


def scripts(name: str) -> list[tuple[Path, list[str]]]:
    """The path and the arguments of each documented script with a file name, where Python is started from the root."""
    found = [
        (Path(word), words[place + 1 :])
        for _, words in COMMANDS
        if words[0] == "nox"
        for place, word in enumerate(words)
        if word.endswith(f"/{name}") and words[place - 1] == "python"
    ]
    assert found
    return found


def launches(script: str) -> list[list[str]]:
    """The arguments that `accelerate launch` is given in each documented command for a script or module."""
    found = [words[words.index("launch") + 1 :] for _, words in COMMANDS if "launch" in words and script in words]
    assert found
    return found
