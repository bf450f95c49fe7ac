"""Digests of everything that answers depend on: code, versions, weights, tasks and documents."""

import ast
import hashlib
import importlib.metadata
import importlib.util
import sysconfig
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from PIL import Image

# Libraries whose version may change an answer.
VERSIONED = (
    *("torch", "torchvision", "transformers", "tokenizers", "sentencepiece", "lmms-eval"),
    *("pillow", "qwen-vl-utils", "decord", "av"),
)
CHUNK = 1 << 24  # bytes of a file that are in memory at a time
THREADS = 8  # that read files
LIBRARIES = [Path(sysconfig.get_path(name)).resolve() for name in ("stdlib", "purelib", "platlib")]


def of_code(packages: Iterable[str]) -> str:
    """Return a digest of the code of packages that make answers, and of the packages that these import."""
    total = hashlib.sha256()
    for package, folder in packages_with(packages).items():
        for file in _code(folder):
            total.update(f"{package}/{file.relative_to(folder)} ".encode() + file.read_bytes())
    return total.hexdigest()


def of_versions() -> dict[str, str]:
    """Return the version of each library that is installed and may change answers."""
    found = {name: _version(name) for name in VERSIONED}
    return {name: version for name, version in found.items() if version}


def of_weights(folders: Iterable[str | Path | None]) -> str:
    """Return a digest of all files in folders, by name and content; what is None or no folder is left out."""
    return _of_files((file, folder) for folder in _folders(folders) for file in folder.rglob("*"))


def of_tasks(folders: Iterable[str | Path | None]) -> str:
    """Return a digest of the files in folders and of the code and settings in folders below, by name and content.

    What is None or no folder is left out.
    """
    return _of_files(
        (file, folder)
        for folder in _folders(folders)
        for file in {*folder.glob("*.*"), *folder.rglob("*.py"), *folder.rglob("*.yaml")}
    )


def _folders(folders: Iterable[str | Path | None]) -> list[Path]:
    return [Path(each) for each in folders if each]


def _of_files(pairs: Iterable[tuple[Path, Path]]) -> str:
    """Return a digest of files, each given with the folder that its name is relative to."""
    # Byte code and what tools leave behind is no content.
    files = sorted(pair for pair in pairs if pair[0].is_file() and not _is_hidden(pair[0].relative_to(pair[1])))
    total = hashlib.sha256()
    with ThreadPoolExecutor(THREADS) as pool:
        digests = pool.map(of_file, (file for file, _ in files))
        for (file, folder), digest in zip(files, digests, strict=True):
            total.update(f"{file.relative_to(folder)} {digest} ".encode())
    return total.hexdigest()


def of_file(file: Path) -> str:
    """Return a digest of a file's content."""
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        while part := stream.read(CHUNK):
            digest.update(part)
    return digest.hexdigest()


def of_value(value: Any) -> str:
    """Return a digest of nested lists and mappings of pictures, texts and numbers; of a path, with its file."""
    digest = hashlib.sha256()
    for part in _parts(value):
        digest.update(part)
    return digest.hexdigest()


def _parts(value: Any) -> Iterator[bytes]:
    if isinstance(value, Mapping):
        for name, part in value.items():
            yield f"{name!r}: ".encode()
            yield from _parts(part)
    elif isinstance(value, (list, tuple)):
        yield f"{len(value)} values ".encode()
        for part in value:
            yield from _parts(part)
    elif isinstance(value, Image.Image):
        yield f"{value.mode} {value.size} ".encode() + value.tobytes()
    else:
        yield f"{value!r} ".encode()
        if isinstance(value, (str, Path)) and _is_file(value):
            yield of_file(Path(value)).encode()


def _is_file(value: str | Path) -> bool:
    try:
        return Path(value).is_file()
    except (OSError, ValueError):  # too long for a name, or with a zero byte
        return False


def packages_with(packages: Iterable[str]) -> dict[str, Path]:
    """Return packages and those that their code imports, and so on, each with its folder; without installed libraries.

    The code of a library changes with its version only; that of the packages of a working tree changes under one.
    """
    found: dict[str, Path] = {}
    left = list(packages)
    while left:
        package = left.pop()
        folder = _folder(package)
        if package not in found and folder is not None:
            found[package] = folder
            left += [name for name in _imported(folder) if not _is_library(name)]
    return dict(sorted(found.items()))


def _folder(package: str) -> Path | None:
    """Return the folder of a package; None for what is no package."""
    spec = importlib.util.find_spec(package)
    locations = spec.submodule_search_locations if spec else None
    return Path(next(iter(locations))).resolve() if locations else None


def _is_library(package: str) -> bool:
    folder = _folder(package)
    return folder is None or any(folder.is_relative_to(library) for library in LIBRARIES)


def _code(folder: Path) -> list[Path]:
    return sorted(folder.rglob("*.py"))


def _is_hidden(file: Path) -> bool:
    return any(part.startswith(".") or part == "__pycache__" for part in file.parts)


def _imported(folder: Path) -> set[str]:
    """Return the top-level names that the code in a folder imports."""
    names: set[str] = set()
    for file in _code(folder):
        try:
            nodes = list(ast.walk(ast.parse(file.read_bytes())))
        except (SyntaxError, ValueError):  # the strategies do without a file that cannot be imported
            continue
        for node in nodes:
            if isinstance(node, ast.Import):
                names |= {each.name.partition(".")[0] for each in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
                names.add(node.module.partition(".")[0])
    return names


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None
