"""Keys that do not change: each caller has one, and the server a file with their hashes.

A line of the file is a name, the SHA-256 of the key in hexadecimal, and groups::

    alice  9f86d081884c7d659a2feaa0c55ad015a3bf4f1b2b0b822cd15d6c15b0f00a08
    oncall 60303ae22b998861bce3b28f33eec1be758a213c86c93c076dbe9f558c11c752 operator

`griffin key` makes a key and its line. A key has 256 random bits, so its plain hash gives nothing
away.
"""

from __future__ import annotations

import hashlib
import hmac
import re
import secrets
from collections.abc import Mapping
from pathlib import Path

from griffin_server.access_settings import CALLER, CALLER_ALLOWED
from griffin_server.security.files import WatchedFiles
from griffin_server.security.principal import Principal

PREFIX = "griffin-"
"""What keys begin with, so that tools that look for leaked secrets find them."""


def new_key() -> str:
    """A key of 256 random bits."""
    return PREFIX + secrets.token_urlsafe(32)


def line_of(key: str, name: str, groups: tuple[str, ...] = ()) -> str:
    """The line of a key in the file."""
    return " ".join((name, _hash(key), *groups))


class ApiKeys:
    """The keys of a file.

    Args:
        path: the file. A key whose line is removed is refused from the next call on.

    Raises:
        BadSecurityFile: the file cannot be read, or a line is malformed.
    """

    def __init__(self, path: Path) -> None:
        self._keys = WatchedFiles("api_keys", (path,), lambda: _read(path))

    def principal(self, key: str) -> Principal | None:
        """Whose key it is; None for nobody's. It takes the same time for every key."""
        given, found = _hash(key), None
        for stored, principal in self._keys.value.items():
            if hmac.compare_digest(stored, given):
                found = principal
        return found


def _read(path: Path) -> Mapping[str, Principal]:
    keys = {}
    for number, line in enumerate(path.read_text().splitlines(), 1):
        words = line.partition("#")[0].split()
        if not words:
            continue
        name, stored, groups = words[0], "".join(words[1:2]).lower(), words[2:]
        if not CALLER.fullmatch(name):
            raise ValueError(f"line {number}: a name has {CALLER_ALLOWED}")
        if not re.fullmatch("[0-9a-f]{64}", stored):
            raise ValueError(f"line {number}: after the name comes the SHA-256 of a key in hex")
        keys[stored] = Principal(name=name, groups=frozenset(groups))
    return keys


def _hash(key: str) -> str:
    return hashlib.sha256(key.encode()).hexdigest()
