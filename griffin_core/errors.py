"""The errors that Griffin raises on purpose.

::

    GriffinError
    ├── InvalidRequest          a value in the request is out of range
    ├── SessionNotFound         no session has that id, or it has been removed
    ├── SessionBusy             the session is still in an earlier turn
    ├── SessionClosed           another call closed the session while it was running
    ├── ReaderTooSlow           the session's client has stopped reading
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
    ├── DeadlinePassed          the caller's deadline passed
    ├── NonFiniteLogits         the model's output was NaN or infinite for this session
    ├── NotReady                the model is still loading
    ├── EngineStopped           the engine is shutting down
    └── EngineFault             a bug, or a failure of the machine (memory, device)

Each message says what was wrong, what was given and what is allowed.
"""

from __future__ import annotations

from collections.abc import Sequence

MOST_LISTED = 10
"""The most items that one message names; the others are counted."""


def shortened(text: str, most: int) -> str:
    """Returns a text for a message, cut to ``most`` characters."""
    return text if len(text) <= most else f"{text[: most - 3]}..."


def listed(items: Sequence[object]) -> str:
    """Returns the first items, and the number of the others."""
    more = len(items) - MOST_LISTED
    shown = ", ".join(map(str, items[:MOST_LISTED]))
    return f"{shown} and {more} more" if more > 0 else shown


class GriffinError(Exception):
    """The base of all errors below. ``str(error)`` is a message for the caller."""


class InvalidRequest(GriffinError):
    """A value of a request is out of range.

    Args:
        field: the path of the field in the public API, such as ``"pruning.density"``.
        given: the invalid value, shortened if it is long.
        allowed: the allowed range, in words.
    """

    def __init__(self, field: str, given: object, allowed: str) -> None:
        shown = given if isinstance(given, str) else repr(given)
        shown = shortened(shown, 80)
        super().__init__(f"{field}: got {shown}; allowed: {allowed}")
        self.field = field
        self.given = shown
        self.allowed = allowed


class SessionNotFound(GriffinError):
    """No running or kept session has this id.

    Args:
        why: why it does not exist, as far as that is known.
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
    """A client has stopped reading its session's output."""


class CapacityExhausted(GriffinError):
    """The request does not fit.

    Args:
        message: what has run out.
        retry_after_s: seconds after which a retry is likely to fit; None if the request can never
            fit.
    """

    def __init__(self, message: str, *, retry_after_s: float | None) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class DeviceMemoryExhausted(GriffinError):
    """At start, a device has too little memory for the weights or for any session."""


class ModelError(GriffinError):
    """The model cannot be loaded."""


class ModelNotFound(ModelError):
    """The directory, file or hub id does not exist."""


class UnknownFamily(ModelError):
    """The decoder does not support the architecture, or a variant of it."""


class BadModelFile(ModelError):
    """The file is truncated, damaged, or not a model."""


class CacheUnusable(ModelError):
    """A converted copy of the model is needed, and the cache cannot be written or is full."""


class HandoffError(GriffinError):
    """Prefill's results did not reach Decode."""


class FingerprintMismatch(HandoffError):
    """Prefill and Decode hold different models."""


class ProtocolMismatch(HandoffError):
    """Prefill and Decode have no common version of the handoff protocol."""


class HandoffBroken(HandoffError):
    """The handoff ended before it finished, or its contents do not verify."""


class PrefillUnavailable(HandoffError):
    """No prefill server answers."""


class DeadlinePassed(GriffinError):
    """The caller's own deadline passed before its request was done."""


class NonFiniteLogits(GriffinError):
    """The model's logits for a session were NaN or infinite, so no token can be drawn.

    Args:
        position: the index in the session's sequence of the token that could not be drawn.
    """

    def __init__(self, *, position: int) -> None:
        super().__init__(
            f"logits: got NaN or an infinite value for the token at position {position}; allowed: "
            "finite values. The model's weights or its data type do not suit this prompt"
        )
        self.position = position


class NotReady(GriffinError):
    """The server is running, but its model is not loaded yet.

    Args:
        retry_after_s: seconds after which to retry.
    """

    def __init__(self, message: str, *, retry_after_s: float) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class EngineStopped(GriffinError):
    """The engine is shutting down: it accepts no new work and has stopped running work."""


class EngineFault(GriffinError):
    """An unexpected failure inside the engine. The affected session has ended; others continue."""

    @classmethod
    def of(cls, error: BaseException, what: str = "") -> EngineFault:
        """The fault to tell callers about, for an unexpected error.

        Args:
            what: put before the error's own words.
        """
        return cls(f"{what}{type(error).__name__}: {error}")
