"""Writes the synchronous client, client.py, from the asynchronous one, aio.py.

The two differ in a few words only, which REWRITES lists; ruff then formats the result. Run by
``make client``; a test and ``make lint`` check that the committed file is fresh.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

PACKAGE = Path(__file__).parent / "griffin_client"
SOURCE, RESULT = PACKAGE / "aio.py", PACKAGE / "client.py"

REWRITES = [
    (
        '"""The asynchronous client. ``client.py`` is made from this file by ``make client``."""',
        '"""The synchronous client, made from ``aio.py`` by ``make client``: edit that file."""',
    ),
    ("Safe to share between tasks.", "Safe to share between threads."),
    ("async def", "def"),
    ("async for", "for"),
    ("async with", "with"),
    ("await ", ""),
    ("asyncio", "time"),
    ("AsyncGenerator[Event, None]", "Generator[Event, None, None]"),
    ("AsyncGenerator[str, None]", "Generator[str, None, None]"),
    ("AsyncGenerator[T, None]", "Generator[T, None, None]"),
    ("AsyncGenerator", "Generator"),
    ("AsyncGriffinClient", "GriffinClient"),
    ("aclose", "close"),
    ("__aenter__", "__enter__"),
    ("__aexit__", "__exit__"),
    ("grpc.aio.", "grpc."),
]
"""What is written in the source -> in the result, replaced in this order."""


def synchronous(source: str) -> str:
    """The synchronous client's text."""
    for before, after in REWRITES:
        source = source.replace(before, after)
    for command in (["check", "--fix", "--select", "I"], ["format"]):
        source = subprocess.run(
            [sys.executable, "-m", "ruff", *command, "--quiet", "--stdin-filename", RESULT, "-"],
            input=source,
            capture_output=True,
            text=True,
            check=True,
        ).stdout
    return source


def main() -> None:
    """Writes client.py; with --check, ends with status 1 if that would change it."""
    text = synchronous(SOURCE.read_text(encoding="utf-8"))
    if sys.argv[1:] != ["--check"]:
        RESULT.write_text(text, encoding="utf-8")
    elif RESULT.read_text(encoding="utf-8") != text:
        sys.exit(f"{RESULT.name} is not what {SOURCE.name} gives: run `make client`.")


if __name__ == "__main__":
    main()
