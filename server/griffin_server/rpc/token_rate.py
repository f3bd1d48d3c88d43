"""How many tokens a minute each caller may have read and made."""

from __future__ import annotations

import asyncio
import time
from typing import Any

import structlog
from limits import RateLimitItemPerMinute
from limits.aio.storage import RedisStorage
from limits.aio.strategies import FixedWindowRateLimiter
from limits.errors import ConfigurationError
from limits.storage import storage_from_string

from griffin_core.errors import CapacityExhausted

log = structlog.get_logger("griffin.limits")


SCHEMES = ("async+memory://", "async+redis://", "async+rediss://")

ANSWER_S = 0.5
"""How long a call waits for the storage; one that does not answer lets requests through."""


def storage_of(uri: str) -> Any:
    """A storage in memory or in Redis.

    Raises:
        ValueError: the scheme is another one, or the rest of the address is wrong.
    """
    if not uri.startswith(SCHEMES):
        raise ValueError(f"allowed: {', '.join(SCHEMES)}")
    try:
        return storage_from_string(uri, implementation="redispy")
    except ConfigurationError as error:
        raise ValueError(f"cannot be used ({error})") from error


class TokenRate:
    """Counts the tokens of callers, anew in each minute.

    A prompt is counted before it is read, and refused if it would be too much. What is made of it
    is counted when it has been made, so that a caller may be over for once. If the storage does not
    answer, requests are let through, and the log says so.

    Args:
        most: tokens a minute of each caller; None for any.
        storage: where they are counted; see ``EngineSettings.limits_storage``.
    """

    def __init__(self, most: int | None, storage: str) -> None:
        self._most = most
        self._charges: set[asyncio.Task[None]] = set()
        self._storage: Any = None
        if most is not None:
            self._storage = storage_of(storage)
            self._limit = RateLimitItemPerMinute(most, namespace="griffin")
            self._counter = FixedWindowRateLimiter(self._storage)

    async def admit(self, owner: str, tokens: int) -> None:
        """Counts a prompt.

        Raises:
            CapacityExhausted: with it, the caller would have more tokens in this minute than it
                may. It is not counted then.
        """
        if self._most is None:
            return
        if tokens > self._most:
            raise CapacityExhausted(
                f"tokens: got a prompt of {tokens}; the server allows a caller {self._most} a "
                "minute (--max-caller-tokens)",
                retry_after_s=None,
            )
        try:
            async with asyncio.timeout(ANSWER_S):
                # Between the two another request may have been counted, here or elsewhere.
                if await self._counter.test(
                    self._limit, owner, cost=tokens
                ) and await self._counter.hit(self._limit, owner, cost=tokens):
                    return
                stats = await self._counter.get_window_stats(self._limit, owner)
        except Exception as error:  # of a storage's own client
            self._lost(error)
            return
        raise CapacityExhausted(
            f"tokens: this prompt of {tokens} with what you have had in this minute is more than "
            f"the {self._most} that the server allows a caller (--max-caller-tokens)",
            retry_after_s=min(60.0, max(0.1, stats.reset_time - time.time())),
        )

    def made(self, owner: str, tokens: int) -> None:
        """Counts tokens that were made. It does not wait for that."""
        if self._most is not None and tokens:
            charge = asyncio.create_task(self._charge(owner, tokens))
            self._charges.add(charge)
            charge.add_done_callback(self._charges.discard)

    async def close(self) -> None:
        """Waits until all tokens are counted, and closes the connections to Redis."""
        await asyncio.gather(*self._charges)
        if isinstance(self._storage, RedisStorage):
            bridge: Any = self._storage.bridge
            await bridge.storage.aclose()

    async def _charge(self, owner: str, tokens: int) -> None:
        try:
            async with asyncio.timeout(ANSWER_S):
                await self._counter.hit(self._limit, owner, cost=tokens)
        except Exception as error:
            self._lost(error)

    def _lost(self, error: Exception) -> None:
        log.error("tokens could not be counted", error=f"{type(error).__name__}: {error}")
