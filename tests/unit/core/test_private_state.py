"""Tests read and patch what our packages offer to everybody, and nothing private of theirs: so that
a class may be rebuilt without its tests."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

TESTS = Path(__file__).parents[2]

ALLOWED = {
    (
        "unit/core/test_hf.py",
        "_parameters",
    ): "torch.nn.Module has no other way to replace a parameter",
    (
        "unit/evals/test_lm.py",
        "_loglikelihood_tokens",
    ): "lm-eval's hf model turns texts into tokens there",
}
"""Private names of other projects that a test uses, and why."""

PATCHES = {"setattr", "getattr", "delattr", "hasattr"}
"""Functions and methods, monkeypatch's among them, that take a name as a string."""


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__")


def private_names(tree: ast.AST) -> Iterator[str]:
    """Private names that are read of anything but ``self`` and ``cls``, passed as strings to
    functions that look them up, or imported."""
    for node in ast.walk(tree):
        match node:
            case ast.Attribute(value=ast.Name(id="self" | "cls")):
                pass
            case ast.Attribute(attr=name) if is_private(name):
                yield name
            case ast.Call(func=ast.Name(id=name) | ast.Attribute(attr=name)) if name in PATCHES:
                for given in node.args:
                    if isinstance(given, ast.Constant) and isinstance(given.value, str):
                        yield from filter(is_private, given.value.split(".")[-1:])
            case ast.ImportFrom(names=names):
                yield from filter(is_private, (each.name for each in names))


@pytest.mark.parametrize(
    ("code", "names"),
    [
        ("running._decoding.scheduler._idle", ["_decoding", "_idle"]),
        ("self._made = cls._count + self.engine._thread", ["_thread"]),
        ("patch.setattr(check, '_reference', None)", ["_reference"]),
        ("patch.setattr('griffin_core.check._reference', None)", ["_reference"]),
        ("from griffin_core.check import _reference", ["_reference"]),
        ("x.__class__; getattr(x, '__self__'); y.name; log['_key']", []),
    ],
)
def test_private_names_are_found(code: str, names: list[str]) -> None:
    assert sorted(private_names(ast.parse(code))) == sorted(names)


def test_no_test_uses_private_names_of_our_packages() -> None:
    found = {
        (path.relative_to(TESTS).as_posix(), name)
        for path in TESTS.rglob("*.py")
        for name in private_names(ast.parse(path.read_text(encoding="utf-8")))
    }
    assert sorted(found - ALLOWED.keys()) == []
    assert sorted(ALLOWED.keys() - found) == []  # what is used no more is allowed no more
