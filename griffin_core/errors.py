"""Everything Griffin raises on purpose.

::

    GriffinError
    ├── InvalidRequest          a value the caller gave is out of range
    ├── SessionNotFound         no session of that id, or not any more
    ├── SessionBusy             the session is still in an earlier turn
    ├── SessionClosed           ended from outside while it was running
    ├── ReaderTooSlow           its client has stopped reading
    ├── CapacityExhausted       no room: now (retry later) or ever
    ├── DeviceMemoryExhausted   the device has no room for the model or its sessions, at start
    ├── ModelError
    │   ├── ModelNotFound       no such directory, file or hub id
    │   ├── UnknownFamily       an architecture the decoder does not define
    │   ├── BadModelFile        truncated, damaged or not a model at all
    │   └── CacheUnusable       no place to keep the converted copy of a model
    ├── HandoffError
    │   ├── FingerprintMismatch the two ends hold different models
    │   ├── ProtocolMismatch    the two ends have no protocol version in common
    │   ├── HandoffBroken       the handoff ended early or did not verify
    │   └── PrefillUnavailable  no prefill server answers
    ├── DeadlinePassed          the caller's time ran out on the way
    ├── NonFiniteLogits         the model's output was NaN or infinite for this session
    ├── NotReady                the model is still loading
    ├── EngineStopped           shutting down
    └── EngineFault             a bug, or the machine gave out (memory, device)

Each message says what was wrong, what was given and what is allowed.
"""

from __future__ import annotations

from collections.abc import Sequence

MOST_LISTED = 10
"""Things that one message names; it counts the others."""


def shortened(text: str, most: int) -> str:
    """The text as a message shows it, cut to ``most`` characters."""
    return text if len(text) <= most else f"{text[: most - 3]}..."


def listed(items: Sequence[object]) -> str:
    """The first items and how many there are beside them."""
    more = len(items) - MOST_LISTED
    shown = ", ".join(map(str, items[:MOST_LISTED]))
    return f"{shown} and {more} more" if more > 0 else shown


class GriffinError(Exception):
    """Base of all errors below. ``str(error)`` is meant for the person who made the call."""


class InvalidRequest(GriffinError):
    """A value of a request is out of range.

    Args:
        field: path of the field as the public API spells it, ``"pruning.density"`` say.
        given: the offending value, shortened if long.
        allowed: the range, in words.
    """

    def __init__(self, field: str, given: object, allowed: str) -> None:
        shown = given if isinstance(given, str) else repr(given)
        shown = shortened(shown, 80)
        super().__init__(f"{field}: got {shown}; allowed: {allowed}")
        self.field = field
        self.given = shown
        self.allowed = allowed


class SessionNotFound(GriffinError):
    """No session of that id is live or kept.

    Args:
        why: what became of it, as far as is known.
    """

    def __init__(self, session_id: str, why: str) -> None:
        super().__init__(f"session_id: no session {session_id[:80]!r}: {why}")


class SessionBusy(GriffinError):
    """A kept session is still in an earlier turn."""

    def __init__(self, session_id: str) -> None:
        super().__init__(f"session_id: session {session_id!r} is still in an earlier turn")


class SessionClosed(GriffinError):
    """A running session was closed by another call."""


class ReaderTooSlow(GriffinError):
    """A client has stopped reading what its session makes."""


class CapacityExhausted(GriffinError):
    """The request does not fit.

    Args:
        message: what is used up.
        retry_after_s: seconds after which room is likely; None if the request can never fit.
    """

    def __init__(self, message: str, *, retry_after_s: float | None) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class DeviceMemoryExhausted(GriffinError):
    """At start, a device has too little memory for the weights or for any session."""


class ModelError(GriffinError):
    """The model cannot be loaded."""


class ModelNotFound(ModelError):
    """No such directory, file or hub id."""


class UnknownFamily(ModelError):
    """The architecture, or a variant of it, is not one the decoder defines."""


class BadModelFile(ModelError):
    """The file is truncated, damaged, or not a model."""


class CacheUnusable(ModelError):
    """A converted copy of the model is needed, and the cache cannot be written or is full."""


class HandoffError(GriffinError):
    """Prefill's results did not reach Decode."""


class FingerprintMismatch(HandoffError):
    """Prefill and Decode hold different models."""


class ProtocolMismatch(HandoffError):
    """Prefill and Decode have no version of the handoff's protocol in common."""


class HandoffBroken(HandoffError):
    """The handoff ended before it finished, or its contents do not verify."""


class PrefillUnavailable(HandoffError):
    """No prefill server answers."""


class DeadlinePassed(GriffinError):
    """The caller's own deadline ran out while others worked for it."""


class NonFiniteLogits(GriffinError):
    """The model's logits for a session were NaN or infinite, so no token can be drawn.

    Args:
        position: index in the session's sequence of the token that was to be drawn.
    """

    def __init__(self, *, position: int) -> None:
        super().__init__(
            f"logits: got NaN or an infinite value for the token at position {position}; allowed: "
            "finite values. The model's weights or its data type do not suit this prompt"
        )
        self.position = position


class NotReady(GriffinError):
    """The server is up and its model is not.

    Args:
        retry_after_s: when to ask again.
    """

    def __init__(self, message: str, *, retry_after_s: float) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class EngineStopped(GriffinError):
    """The engine is shutting down and takes or continues no work."""


class EngineFault(GriffinError):
    """An unexpected failure inside the engine; the session it hit is gone, others go on."""
