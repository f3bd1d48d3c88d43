"""What the extra `server` installs is used."""

from __future__ import annotations

import ast
import functools
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
IMPORTED_AS = {
    "googleapis-common-protos": "google.rpc",
    "grpcio-health-checking": "grpc_health",
    "grpcio-reflection": "grpc_reflection",
    "opentelemetry-exporter-otlp-proto-grpc": "opentelemetry.exporter.otlp.proto.grpc",
    "opentelemetry-sdk": "opentelemetry.sdk",
    "pyjwt[crypto]": "jwt",
}
"""Packages whose modules have another name."""

BY_OTHERS = {"accelerate", "redis", "sentencepiece"}
"""Packages that transformers and limits import for what Griffin asks of them."""


def dependencies() -> list[str]:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    return [line.partition(">")[0] for line in project["optional-dependencies"]["server"]]


@functools.cache
def imported() -> set[str]:
    """Names of all modules that core and server import."""
    names: set[str] = set()
    for directory in ("griffin_core", "server/griffin_server"):
        for path in (ROOT / directory).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.Import):
                    names |= {alias.name for alias in node.names}
                elif isinstance(node, ast.ImportFrom) and node.module:
                    names.add(node.module)
    return names


@pytest.mark.parametrize("package", dependencies())
def test_each_dependency_is_imported(package: str) -> None:
    module = IMPORTED_AS.get(package, package.replace("-", "_"))
    used = any(name == module or name.startswith(f"{module}.") for name in imported())
    assert used or package in BY_OTHERS
