"""What an engine may hold, and for how long."""

from __future__ import annotations

from dataclasses import dataclass

from griffin_core.forward.prefill import CHUNK_TOKENS

IDLE_SHARE = 0.25
"""Share of the sessions' memory for those that are kept between turns, unless a limit is set."""


@dataclass(frozen=True, kw_only=True)
class Limits:
    """Limits of an engine.

    Args:
        max_sessions: sessions in prefill or decode at once.
        max_owner_sessions: of these, those of one owner; None for as many.
        owner_share: share of the bytes that the running sessions of one owner may reserve, in
            (0, 1]; None for all.
        max_owner_queue: sessions of one owner that may wait; None for as many as of all.
        max_queue: sessions that may wait. In addition, as many prefills for other servers may wait.
        session_bytes: bytes for the KV caches and slim views of all sessions together; None for
            ``memory_fraction`` of what the device has free once the engine is prepared; 0 for an
            engine that only prefills for others.
        idle_bytes: bytes of these that sessions kept between turns may hold; None for
            ``IDLE_SHARE`` of them.
        memory_fraction: in (0, 1]; None for the device's default (``device_memory.FRACTIONS``).
        session_ttl_s: how long a kept session may be idle.
        reader_timeout_s: how long a session waits for a client that does not read.
        chunk_tokens: prompt tokens prefilled between two decode steps.
        prefill_share: share of the time that prefills get while sessions decode, in (0, 1].

    Raises:
        ValueError: a limit is out of range.
    """

    max_sessions: int = 64
    max_owner_sessions: int | None = None
    owner_share: float | None = None
    max_owner_queue: int | None = None
    max_queue: int = 256
    session_bytes: int | None = None
    idle_bytes: int | None = None
    memory_fraction: float | None = None
    session_ttl_s: float = 600.0
    reader_timeout_s: float = 60.0
    chunk_tokens: int = CHUNK_TOKENS
    prefill_share: float = 0.5

    def __post_init__(self) -> None:
        for name, least in (
            ("max_sessions", 1),
            ("max_owner_sessions", 1),
            ("max_owner_queue", 0),
            ("max_queue", 0),
            ("session_bytes", 0),
            ("idle_bytes", 0),
            ("session_ttl_s", 0),
            ("reader_timeout_s", 0),
            ("chunk_tokens", 1),
        ):
            value = getattr(self, name)
            if value is not None and not value >= least:
                raise ValueError(f"{name}: got {value}; allowed: >= {least}")
        for name in ("prefill_share", "memory_fraction", "owner_share"):
            value = getattr(self, name)
            if value is not None and not 0 < value <= 1:
                raise ValueError(f"{name}: got {value}; allowed: (0, 1]")

    @property
    def owner_sessions(self) -> int:
        """The most sessions of one owner in prefill or decode at once."""
        return self.max_sessions if self.max_owner_sessions is None else self.max_owner_sessions

    def owner_bytes_of(self, session_bytes: int) -> int:
        """Bytes that the running sessions of one owner may reserve.

        Args:
            session_bytes: bytes for all sessions.
        """
        return session_bytes if self.owner_share is None else int(self.owner_share * session_bytes)

    def idle_bytes_of(self, session_bytes: int) -> int:
        """Bytes that kept sessions may hold.

        Args:
            session_bytes: bytes for all sessions.
        """
        if self.idle_bytes is None:
            return int(session_bytes * IDLE_SHARE)
        return min(self.idle_bytes, session_bytes)
