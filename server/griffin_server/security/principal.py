"""Who makes a call."""

from __future__ import annotations

from contextvars import ContextVar
from dataclasses import dataclass

OPERATOR = "operator"
"""The group whose members see and close everybody's sessions."""


@dataclass(frozen=True, kw_only=True)
class Principal:
    """Who makes a call, as a certificate, a token or a key says.

    Args:
        name: owns the sessions that it opens. One name from two sources is one principal.
        groups: what it belongs to; see ``OPERATOR``.
    """

    name: str
    groups: frozenset[str] = frozenset()

    @property
    def sees(self) -> str | None:
        """Whose sessions it sees: its own, or with None everybody's."""
        return None if OPERATOR in self.groups else self.name


LOCAL = Principal(name="", groups=frozenset({OPERATOR}))
"""Every caller of a server that asks nobody who they are."""

principal_var: ContextVar[Principal] = ContextVar("principal", default=LOCAL)
"""Who makes the call that is being served."""
