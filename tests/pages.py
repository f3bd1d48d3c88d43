"""The programs and commands on the pages of the documentation."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

ROOT = Path(__file__).parents[1]


def read_page(path: str) -> str:
    """The text of a page, by its path in the repository."""
    return (ROOT / path).read_text(encoding="utf-8")


def sections(page: str) -> dict[str, str]:
    """The text below each heading of the second level, by heading."""
    parts = page.split("\n## ")[1:]
    return {part.splitlines()[0]: part for part in parts}


def code_blocks(text: str, language: str) -> list[str]:
    """The contents of all fenced blocks of a language."""
    return re.findall(rf"```{language}\n(.*?)```", text, re.DOTALL)


def commands(text: str) -> list[list[str]]:
    """The `griffin` commands of each console block."""
    return [
        [line.removeprefix("$ ") for line in block.splitlines() if line.startswith("$ griffin ")]
        for block in code_blocks(text, "console")
    ]


def arguments(command: str) -> list[str]:
    """The arguments of a `griffin` command, without its comment."""
    name, *rest = shlex.split(command, comments=True)
    assert name == "griffin", command
    return rest
