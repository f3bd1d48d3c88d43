"""Rooms stay small: how long a module and how large a class may be."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
PACKAGES = ("griffin_core", "server/griffin_server", "client/griffin_client")
MODULES = sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))
MOST_LINES, MOST_METHODS = 350, 20


def classes() -> dict[str, ast.ClassDef]:
    nodes = (node for path in MODULES for node in ast.parse(path.read_text("utf-8")).body)
    return {node.name: node for node in nodes if isinstance(node, ast.ClassDef)}


def methods(name: str, known: dict[str, ast.ClassDef]) -> set[str]:
    """Names of a class's methods, those it inherits from classes of ours included."""
    if name not in known:
        return set()
    node = known[name]
    own = {
        each.name for each in node.body if isinstance(each, ast.FunctionDef | ast.AsyncFunctionDef)
    }
    bases = [ast.unparse(base).split(".")[-1] for base in node.bases]
    return own.union(*(methods(base, known) for base in bases if base != name))


@pytest.mark.parametrize("package", PACKAGES)
def test_no_module_is_long(package: str) -> None:
    sizes = {
        str(path.relative_to(ROOT)): len(path.read_text("utf-8").splitlines())
        for path in MODULES
        if (ROOT / package) in path.parents
    }
    assert sizes
    assert {path: lines for path, lines in sizes.items() if lines > MOST_LINES} == {}


def test_no_class_has_many_methods() -> None:
    known = classes()
    counts = {name: len(methods(name, known)) for name in known}
    assert counts["CudaBackend"] > 10, "inherited methods are counted"
    assert {name: count for name, count in counts.items() if count > MOST_METHODS} == {}
