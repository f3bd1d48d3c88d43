"""What the log says of each call besides its method and status: nothing of what is said in it."""

from __future__ import annotations

from contextvars import ContextVar
from dataclasses import dataclass


@dataclass(kw_only=True)
class Audit:
    """What a call was about and how much it moved.

    Args:
        session: the id of the session that it opened, continued, looked at or closed.
        prompt_tokens: that were read for it.
        generated_tokens: that were sent to its client.
        request_bytes, response_bytes: of its messages.
    """

    session: str = ""
    prompt_tokens: int = 0
    generated_tokens: int = 0
    request_bytes: int = 0
    response_bytes: int = 0

    def known(self) -> dict[str, str | int]:
        """What there is to say."""
        return {name: value for name, value in vars(self).items() if value}


audit_var: ContextVar[Audit | None] = ContextVar("audit", default=None)
"""That of the call that is being served."""


def audit() -> Audit:
    """That of the call that is being served; outside of calls, one that nobody reads."""
    return audit_var.get() or Audit()
