"""The house: which part of the package `strategy` may import which, and how large its files and classes may be.

Everything is read from the source, so that imports inside functions and under TYPE_CHECKING count too.
"""

import ast
import sys
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path
from typing import NamedTuple

import pytest

PACKAGE = Path(__file__).parents[2] / "strategy"
MAX_FILE_LINES = 350
MAX_CLASS_LINES = 200

CONTRACTS = {"backbone", "base", "config", "options", "plan", "registry"}
SHIMS = {"parallel", "zero"}  # former places of public functions, which warn
# A room may import itself and the rooms that stand here.
MAY_IMPORT = {
    "kernels": set(),
    "contracts": {"kernels"},
    "methods": {"kernels", "contracts"},
    "distributed": {"kernels", "contracts"},
    "metrics": {"kernels", "contracts", "distributed"},
    "pruning": {"kernels", "contracts", "distributed", "metrics"},
    "graph": {"kernels", "contracts", "distributed", "metrics", "pruning"},
    "attach": {"kernels", "contracts", "distributed", "metrics", "pruning", "graph"},
    "evaluation": {"kernels", "contracts", "distributed", "metrics", "pruning", "graph", "attach"},
    "shims": {"distributed"},
    "api": {"contracts", "methods", "kernels", "metrics", "attach"},
}
# Third-party packages that a module may import when it is imported itself.
REQUIRED = {"torch", "filelock", "PIL"}
# What comes with torch where there are GPUs, and the files that may import it, which only functions import.
BESIDE_TORCH = dict.fromkeys(("strategy.kernels.decode_triton", "strategy.kernels.packed_triton"), "triton")
# Those that only functions may import, and the room whose functions may.
IN_FUNCTIONS = {
    "deepspeed": "distributed",
    "huggingface_hub": "evaluation",
    "lmms_eval": "evaluation",
    "loguru": "evaluation",
    "safetensors": "evaluation",
}

FILES = sorted(PACKAGE.rglob("*.py"))
file_by_file = pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(PACKAGE).with_suffix("")))


class Import(NamedTuple):
    """One imported module or name: where it stands in its file, and whether inside a function."""

    target: str
    line: int
    in_function: bool


def module_name(file: Path) -> str:
    """Return the dotted name of a file's module."""
    parts = file.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(file) for file in FILES}


def room(module: str) -> str:
    """Return the room that a module of the package belongs to."""
    first = module.split(".")[1] if "." in module else ""
    if (PACKAGE / first / "__init__.py").exists() and first:
        return first
    if first in CONTRACTS:
        return "contracts"
    if first in SHIMS:
        return "shims"
    return {"": "api", "attach": "attach"}.get(first, "methods")


def imports(file: Path) -> Iterator[Import]:
    """Yield what a file imports: of `from a import b` the module a.b if there is one, otherwise a."""

    def visit(node: ast.AST, in_function: bool) -> Iterator[Import]:
        if isinstance(node, ast.Import):
            yield from (Import(alias.name, node.lineno, in_function) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{file}:{node.lineno}: a relative import"
            assert node.module
            for alias in node.names:
                submodule = f"{node.module}.{alias.name}"
                yield Import(submodule if submodule in MODULES else node.module, node.lineno, in_function)
        inner = in_function or isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
        for child in ast.iter_child_nodes(node):
            yield from visit(child, inner)

    return visit(ast.parse(file.read_text()), False)


def own_imports(file: Path) -> list[Import]:
    """Return what a file imports of the package itself."""
    return [each for each in imports(file) if each.target.split(".")[0] == "strategy"]


@file_by_file
def test_imports_point_one_way(file):
    own = room(module_name(file))
    wrong = [
        f"line {each.line}: {own} imports {each.target} ({room(each.target)})"
        for each in own_imports(file)
        if room(each.target) not in {own, *MAY_IMPORT[own]}
    ]
    assert not wrong


def test_no_modules_import_each_other_in_a_circle():
    graph = {module_name(file): {each.target for each in own_imports(file)} for file in FILES}
    order = list(TopologicalSorter(graph).static_order())  # raises CycleError, which shows the circle
    assert set(order) == MODULES


@file_by_file
def test_the_package_needs_torch_and_imports_nothing_of_models_or_evaluations(file):
    wrong = []
    for each in imports(file):
        name = each.target.split(".")[0]
        allowed = name in {*REQUIRED, *sys.stdlib_module_names, "strategy", BESIDE_TORCH.get(module_name(file))}
        if not allowed and not (each.in_function and IN_FUNCTIONS.get(name) == room(module_name(file))):
            wrong.append(f"line {each.line}: {each.target}")
    assert not wrong


@file_by_file
def test_files_and_classes_are_short(file):
    source = file.read_text()
    classes = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.ClassDef)]
    lengths = {node.name: node.end_lineno - node.lineno + 1 for node in classes if node.end_lineno}
    assert len(source.splitlines()) <= MAX_FILE_LINES
    assert not {name: length for name, length in lengths.items() if length > MAX_CLASS_LINES}


@file_by_file
def test_private_names_stay_in_their_module(file):
    tree = ast.parse(file.read_text())
    wrong, local = [], {}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "strategy":
            wrong += [f"line {node.lineno}: {alias.name}" for alias in node.names if is_private(alias.name)]
            local |= {alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names}
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and is_private(node.attr):
            owner = local.get(node.value.id)
            wrong += [f"line {node.lineno}: {owner}.{node.attr}"] if owner else []
    assert not wrong


def is_private(name: str) -> bool:
    """Return whether a name begins with one underscore."""
    return name.startswith("_") and not name.startswith("__")


def test_every_room_has_modules_and_every_method_is_a_file_that_registers_a_strategy():
    assert {room(module) for module in MODULES} == set(MAY_IMPORT)
    methods = [file for file in FILES if room(module_name(file)) == "methods"]
    silent = [file.name for file in methods if "@register(" not in file.read_text()]
    assert not silent
