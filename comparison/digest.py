"""A digest of everything that answers depend on: code, weights, tasks and versions."""

import ast
import hashlib
import importlib.metadata
import importlib.util
import sysconfig
from collections.abc import Iterable
from pathlib import Path

VERSIONED = ("torch", "transformers", "lmms-eval")
START = 1 << 20  # bytes of a data file that are read; its name and its size count, too
LIBRARIES = [Path(sysconfig.get_path(name)).resolve() for name in ("stdlib", "purelib", "platlib")]


def digest(packages: Iterable[str], data: Iterable[str | Path | None]) -> str:
    """Return a digest of code, data and versions.

    Args:
        packages: Packages whose code makes answers; the packages that they import are added, see `packages_with`.
        data: Folders of weights, tasks and questions; what is None or no folder is left out.
    """
    total = hashlib.sha256()
    for package, folder in packages_with(packages).items():
        for file in _code(folder):
            total.update(f"{package}/{file.relative_to(folder)} ".encode() + file.read_bytes())
    for folder in [Path(each) for each in data if each]:
        # Tasks may have code and settings in folders below.
        for file in sorted({*folder.glob("*.*"), *folder.rglob("*.py"), *folder.rglob("*.yaml")}):
            if file.is_file():
                with file.open("rb") as stream:
                    name = f"{file.relative_to(folder)} {file.stat().st_size} "
                    total.update(name.encode() + stream.read(START))
    for name in VERSIONED:
        total.update(f"{name} {_version(name)} ".encode())
    return total.hexdigest()


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


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"
