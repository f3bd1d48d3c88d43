"""Runs the commands of a page as they are typed."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

from tests.pages import arguments

TYPED = {"griffin chat": "What does a compiler do?\n\n"}
"""Command -> what its user types."""


def run(command: list[str], directory: Path, target: str, typed: str = "") -> str:
    """Standard output of a command that must succeed."""
    done = subprocess.run(
        command,
        cwd=directory,
        env={**os.environ, "GRIFFIN_TARGET": target, "TERM": "dumb"},
        input=typed,
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert done.returncode == 0, f"{command}: {done.stderr}"
    return done.stdout


def run_griffin(command: str, directory: Path, target: str) -> str:
    """Standard output of a `griffin` command of a page."""
    typed = TYPED.get(command.partition("  ")[0], "")
    whole = [sys.executable, "-m", "griffin_server", *arguments(command)]
    return run(whole, directory, target, typed)


def loops(text: str) -> bool:
    """Whether four words in a row repeat the words just before them, as in "and, and, and, and"."""
    words = re.findall(r"\w+", text.lower())
    return any(
        words[at : at + 4] == words[at - period : at - period + 4]
        for period in range(1, 5)
        for at in range(period, len(words) - 3)
    )
