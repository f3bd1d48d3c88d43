"""Runs servers and helpers of benchmarks as processes of their own."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

START_S = 600.0
"""The longest that a server may take to load its model and to capture its graphs."""


@contextlib.contextmanager
def serving(*arguments: str, log: Path) -> Iterator[str]:
    """Runs `griffin serve` on a free port until the block ends.

    Args:
        log: the file for the server's log; a pipe that is not read would block the server.

    Yields:
        The server's address, once it serves.

    Raises:
        RuntimeError: the server ended, or did not serve within ``START_S``; the message has the end
            of its log.
    """
    with started(*arguments, log=log) as server:
        yield address(server, log)


@contextlib.contextmanager
def started(*arguments: str, log: Path) -> Iterator[subprocess.Popen[bytes]]:
    """Starts a server like ``serving``, but does not wait, so that several can load at once. See
    ``address``."""
    command = [sys.executable, "-m", "griffin_server", "serve", "--port", "0"]
    with log.open("wb") as file:
        process = subprocess.Popen([*command, "--log-format", "json", *arguments], stderr=file)
        try:
            yield process
        finally:
            process.terminate()
            try:
                process.wait(60)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def address(server: subprocess.Popen[bytes], log: Path) -> str:
    """Waits until a server serves, and returns its address.

    Raises:
        RuntimeError: see ``serving``.
    """
    deadline = time.monotonic() + START_S
    while server.poll() is None and time.monotonic() < deadline:
        for line in log.read_text(encoding="utf-8", errors="replace").splitlines():
            with contextlib.suppress(ValueError):
                event = json.loads(line)
                if isinstance(event, dict) and event.get("event") == "serving":
                    return str(event["address"])
        time.sleep(0.1)
    end = log.read_text(encoding="utf-8", errors="replace")[-3000:]
    raise RuntimeError(f"a server did not start (exit status {server.poll()}):\n{end}")


class Helper:
    """A process that answers lines of JSON with lines of JSON.

    Args:
        module: run with this interpreter; its standard error is shown.
        arguments: the arguments of its command line.
    """

    def __init__(self, module: str, *arguments: str) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", module, *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def ask(self, question: Any) -> Any:
        """Sends a question and returns the answer.

        Raises:
            RuntimeError: the process ended instead.
        """
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(question) + "\n")
        self._process.stdin.flush()
        return self.answer()

    def answer(self) -> Any:
        """Returns the next answer without sending a question.

        Raises:
            RuntimeError: the process ended instead.
        """
        assert self._process.stdout is not None
        if line := self._process.stdout.readline():
            return json.loads(line)
        raise RuntimeError(f"{self._process.args} ended with {self._process.wait()}")

    def close(self) -> None:
        """Ends the process, which frees its memory on a GPU."""
        self._process.kill()
        self._process.wait()

    def __enter__(self) -> Helper:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
