"""A journal of answers on disk: an append-only file of JSON lines."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import threading
from pathlib import Path
from types import TracebackType
from typing import Any

from griffin_evals.errors import JournalError

LINE_START = b'{"key": "'
"""The start of every line. A last line without it was not cut off: the file is no journal."""


class Journal:
    """A map from keys to values, kept in a file. Safe to share between threads, but not between
    processes.

    Each line is written and synced before ``put`` returns, so a killed process loses nothing that
    it has put. A last line that was cut off is dropped.

    Args:
        path: the file, which is created if it is missing, like its directories.

    Raises:
        JournalError: the file cannot be opened, has a line that is not a journal line, or is open
            in another journal. The file is not changed.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._lock = threading.Lock()
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._file = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
        except OSError as error:
            raise JournalError(f"{self.path}: cannot be opened: {error.strerror}") from error
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self._values = self._read()
        except BlockingIOError as error:
            os.close(self._file)
            raise JournalError(f"{self.path}: another process or journal has it open") from error
        except BaseException:
            os.close(self._file)
            raise

    def get(self, key: str) -> Any:
        """Returns the value of a key; None if there is none."""
        return self._values.get(key)

    def put(self, key: str, value: Any) -> None:
        """Adds a value, or replaces it.

        Args:
            value: a JSON value other than None.

        Raises:
            OSError: the disk is full. A partly written line is removed, so that another one can
                follow.
        """
        line = json.dumps({"key": key, "value": value}).encode() + b"\n"
        with self._lock:
            if (written := os.write(self._file, line)) < len(line):
                os.ftruncate(self._file, os.fstat(self._file).st_size - written)
                raise OSError(errno.ENOSPC, "the line was written in part", str(self.path))
            os.fdatasync(self._file)
            self._values[key] = value

    def __len__(self) -> int:
        return len(self._values)

    def close(self) -> None:
        """Closes the file. May be repeated."""
        with self._lock:
            if self._file >= 0:
                os.close(self._file)
            self._file = -1

    def __enter__(self) -> Journal:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _read(self) -> dict[str, Any]:
        """Reads all values. A partial last line is cut off the file, so that the next one starts on
        a new line."""
        values: dict[str, Any] = {}
        lines = self.path.read_bytes().splitlines(keepends=True)
        for number, line in enumerate(lines, start=1):
            if not line.endswith(b"\n") and line[: len(LINE_START)] == LINE_START[: len(line)]:
                os.ftruncate(self._file, sum(map(len, lines[:-1])))
                break
            try:
                entry = json.loads(line)
                values[entry["key"]] = entry["value"]
            except (ValueError, KeyError, TypeError) as error:
                raise JournalError(f"{self.path}:{number}: is not a line of a journal") from error
        return values
