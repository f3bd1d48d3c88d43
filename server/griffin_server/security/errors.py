"""What goes wrong with callers and with the files that say who they are."""

from __future__ import annotations

from pathlib import Path

from griffin_core.errors import GriffinError


class Unauthenticated(GriffinError):
    """A call does not say who makes it, or what it says does not hold."""


class PermissionDenied(GriffinError):
    """A caller is known, and may not do this."""


class BadSecurityFile(GriffinError):
    """A file with certificates or keys cannot be used.

    Args:
        setting: the setting that names the file.
        why: what is wrong with it. Nothing of a key's text may be in it.
    """

    def __init__(self, setting: str, path: Path | str, why: object) -> None:
        super().__init__(f"{setting}: cannot use {str(path)!r} ({why})")
