"""Files with secrets, which may change while the server runs."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Generic, TypeVar

import structlog

from griffin_server.security.errors import BadSecurityFile

T = TypeVar("T")

log = structlog.get_logger("griffin.security")

Stamp = tuple[tuple[int, int, int], ...]


class WatchedFiles(Generic[T]):
    """What some files say, read again once one of them has changed. May be used from any thread.

    Files that are being replaced may not fit together for a moment. While they cannot be used, what
    they said before holds, and the log says so once for each change.

    Args:
        setting: the setting that names them, for errors.
        paths: the files.
        read: what they say. It raises OSError or ValueError for files that cannot be used.

    Raises:
        BadSecurityFile: they cannot be used now.
    """

    def __init__(self, setting: str, paths: Sequence[Path], read: Callable[[], T]) -> None:
        self._setting = setting
        self._paths = paths
        self._read = read
        self._lock = threading.Lock()
        try:
            self._stamp = self._now()
            self._value = read()
        except (OSError, ValueError) as error:
            raise BadSecurityFile(setting, self._names, error) from error

    @property
    def value(self) -> T:
        """What the files say."""
        return self.newer()[0]

    def newer(self) -> tuple[T, bool]:
        """What the files say, and whether that has changed since it was last asked for."""
        with self._lock:
            missing: OSError | None = None
            try:
                stamp = self._now()
            except OSError as error:
                stamp, missing = (), error
            if stamp == self._stamp:
                return self._value, False
            self._stamp = stamp
            try:
                if missing is not None:
                    raise missing
                self._value = self._read()
            except (OSError, ValueError) as error:
                log.error(str(BadSecurityFile(self._setting, self._names, error)))
                return self._value, False
            log.info("security files read again", setting=self._setting)
            return self._value, True

    @property
    def _names(self) -> str:
        return ", ".join(map(str, self._paths))

    def _now(self) -> Stamp:
        """What changes when a file does, also if it is a link to another file."""
        status = [os.stat(path) for path in self._paths]
        return tuple((one.st_mtime_ns, one.st_size, one.st_ino) for one in status)
