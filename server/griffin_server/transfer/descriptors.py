"""How a decode server gives memory to a prefill server of its host: the descriptor of the memory,
over a Unix socket, for the nonce that the offer names. Each nonce is good for one descriptor.

The sockets are in a directory that only one user can open. Memory itself has no name anywhere.
"""

from __future__ import annotations

import os
import re
import secrets
import socket
import stat
import tempfile
import threading
from contextlib import suppress
from pathlib import Path

import structlog

from griffin_server.address import MOST_PATH_BYTES, server_has_ended
from griffin_server.security.errors import BadSecurityFile
from griffin_server.settings import Settings

NONCE_BYTES = 16

NONCE_S, ANSWER_S = 0.5, 2.0
"""The longest that the end that gives waits for a nonce, and the other end for its answer."""

_NAME = re.compile(r"handoff-[0-9a-f]{16}")

log = structlog.get_logger("griffin.handoff")


def default_directory() -> Path:
    """The directory of this user's sockets where the settings name none."""
    return Path(tempfile.gettempdir()) / f"griffin-{os.geteuid()}"


def open_directory(path: Path) -> None:
    """Creates the directory with mode 0700 if it does not exist.

    Raises:
        OSError: it cannot be created, belongs to another user, others can open it, or its path is
            too long for a socket's.
    """
    if len(os.fsencode(path / f"handoff-{'0' * 16}")) > MOST_PATH_BYTES:
        raise OSError(f"the path is too long: a socket's has at most {MOST_PATH_BYTES} bytes")
    with suppress(FileExistsError):
        path.mkdir(mode=0o700)
    found = path.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.geteuid() or found.st_mode & 0o077:
        raise OSError("it must be a directory of this user that nobody else can open (mode 0700)")


def handoff_directory(settings: Settings) -> Path | None:
    """The directory of the sockets; None for no shared memory.

    Raises:
        BadSecurityFile: the settings name a directory that cannot be used; see ``open_directory``.
    """
    if settings.handoff == "messages":
        return None
    directory = settings.handoff_dir or default_directory()
    try:
        open_directory(directory)
    except OSError as error:
        problem = BadSecurityFile("handoff_dir", directory, error)
        if settings.handoff_dir is not None:
            raise problem from error
        log.warning(f"{problem}; KV is handed off in messages")
        return None
    return directory


class DescriptorSocket:
    """Hands out the descriptors that are offered, on a thread of its own, until ``close``.

    Args:
        directory: of the socket's file; sockets there whose servers have ended are removed.

    Raises:
        OSError: see ``open_directory``; or no socket can be made there.
    """

    def __init__(self, directory: Path) -> None:
        open_directory(directory)
        _remove_stale(directory)
        self.name = f"handoff-{secrets.token_hex(8)}"
        """The name of its file."""
        self._path = directory / self.name
        self._offered: dict[bytes, int] = {}
        self._lock = threading.Lock()
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._socket.bind(os.fspath(self._path))
        self._socket.listen(64)
        self._thread = threading.Thread(target=self._serve, name="griffin-handoff", daemon=True)
        self._thread.start()

    def offer(self, nonce: bytes, descriptor: int) -> None:
        """Gives the descriptor to the one that first asks with the nonce."""
        with self._lock:
            self._offered[nonce] = descriptor

    def withdraw(self, nonce: bytes) -> None:
        """Gives the descriptor to nobody from now on. It may be closed then."""
        with self._lock:
            self._offered.pop(nonce, None)

    def close(self) -> None:
        """Stops listening and removes the socket's file."""
        self._path.unlink(missing_ok=True)
        with suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)  # the thread's accept then ends
        self._thread.join()
        self._socket.close()

    def _serve(self) -> None:
        while True:
            try:
                caller, _ = self._socket.accept()
            except OSError as error:
                if not self._path.exists():
                    return
                log.error("the handoff's socket does not accept", error=str(error))
                threading.Event().wait(NONCE_S)  # it may have been out of descriptors
                continue
            with caller, suppress(OSError):
                caller.settimeout(NONCE_S)
                nonce = caller.recv(NONCE_BYTES)
                with self._lock:
                    descriptor = self._offered.pop(nonce, None)
                    if descriptor is not None:
                        socket.send_fds(caller, [b"+"], [descriptor])


def fetch(directory: Path, name: str, nonce: bytes) -> int | None:
    """The descriptor that a server of this host offers, which the caller closes; None if there is
    none, or the name is not that of a socket in the directory."""
    if not _NAME.fullmatch(name) or len(nonce) != NONCE_BYTES:  # also refuses paths
        return None
    descriptors: list[int] = []
    with (
        suppress(OSError),
        socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as caller,
    ):
        open_directory(directory)
        caller.settimeout(ANSWER_S)
        caller.connect(os.fspath(directory / name))
        caller.send(nonce)
        _, descriptors, _, _ = socket.recv_fds(caller, 1, 1)
    return descriptors[0] if descriptors else None


def _remove_stale(directory: Path) -> None:
    """Removes the sockets of servers that died without removing them."""
    for path in directory.glob("handoff-*"):
        if _NAME.fullmatch(path.name):
            with suppress(OSError):  # it has been removed meanwhile, say
                if server_has_ended(os.fspath(path), socket.SOCK_SEQPACKET):
                    path.unlink()
