"""The locks name all that pyproject.toml asks for, in versions that it allows."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[3]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))


def pinned(name: str) -> dict[str, str]:
    """The versions of a file of ``requirements/``, by package."""
    text = (ROOT / "requirements" / name).read_text("utf-8")
    found = re.findall(r"^([\w.-]+)(?:\[[\w,]+\])?==([^\s;]+)", text, re.MULTILINE)
    return {canonicalize_name(package): version for package, version in found}


def required(*extras: str) -> Iterator[Requirement]:
    """What the project and these extras of it need, and what builds it."""
    project = PROJECT["project"]
    texts = [*project["dependencies"], *PROJECT["build-system"]["requires"]]
    for extra in extras:
        texts += project["optional-dependencies"][extra]
    for text in texts:
        requirement = Requirement(text)
        if requirement.name == project["name"]:
            yield from required(*requirement.extras)
        elif requirement.marker is None or requirement.marker.evaluate():
            yield requirement


@pytest.mark.parametrize(
    ("lock", "extras"),
    [("server.lock", ["server"]), ("dev.lock", ["server", "inspect", "eval", "dev"])],
)
def test_a_lock_has_what_the_project_asks_for(lock: str, extras: list[str]) -> None:
    versions = pinned(lock) | pinned("torch.txt")
    for requirement in required(*extras):
        version = versions[canonicalize_name(requirement.name)]
        assert requirement.specifier.contains(version), f"{requirement}: {version}"


def test_the_locks_agree_and_leave_torch_out() -> None:
    server, dev = pinned("server.lock"), pinned("dev.lock")
    assert server.items() <= dev.items()
    assert "torch" not in dev and pinned("torch.txt").keys() == {"torch"}


@pytest.mark.parametrize(
    "lock", sorted((ROOT / "requirements").glob("*.lock")), ids=lambda p: p.name
)
def test_each_package_of_a_lock_has_hashes(lock: Path) -> None:
    text = lock.read_text("utf-8")
    blocks = re.split(r"^(?=[A-Za-z0-9])", text, flags=re.MULTILINE)[1:]
    assert blocks and all("--hash=sha256:" in block for block in blocks)
