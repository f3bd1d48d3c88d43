"""The memory of an engine's sessions: the budget, the pool of KV slots, what a GPU was claimed for.

What the budget counts as held is what is there.
"""

from __future__ import annotations

import logging

from griffin_core.engine.device_memory import (
    DeviceShare,
    budget_from_cpu,
    format_bytes,
    fraction_of,
    graph_bytes,
    step_rows,
    tokens_held,
)
from griffin_core.engine.limits import Limits
from griffin_core.engine.session import Session
from griffin_core.kv.budget import Budget
from griffin_core.kv.cache import KvCache
from griffin_core.kv.pool import KvPool, kv_bytes
from griffin_core.model.decoder import Decoder

log = logging.getLogger(__name__)

OBJECT_BYTES, TOKEN_BYTES = 16 << 10, 40
"""What a session takes on the host beside its tensors: its objects and the rounding of its tensors
to pages, and each of its tokens in a list of Python integers."""

LARGEST_STRIDE = (1 << 31) - 1
"""Values from one head of a layer's keys to the next, at most: torch's attention kernels count them
in 32 bits. Only a very small model on a large device has room for more."""


class SessionMemory:
    """Where sessions' KV caches lie, and what caches and slim views may hold together. Owned by the
    engine's thread, except for reads of ``budget``.

    Args:
        limits: say how many bytes, or which fraction of the device's free memory.
        tails: whether graphs of prompts keep what residuals are fitted to.
    """

    def __init__(self, decoder: Decoder, limits: Limits, *, tails: bool = False) -> None:
        self._tails = tails
        self.budget = Budget(0)  # until ``open``
        self._decoder = decoder
        self._limits = limits
        self._pool: KvPool | None = None
        self._share: DeviceShare | None = None  # of a GPU's memory

    # -- all of it -------------------------------------------------------------------------------

    def open(self) -> KvPool:
        """Sets the budget, as the limits say or from what the device has left, and allocates the KV
        pool, with a slot for every token that the budget allows.

        Raises:
            DeviceMemoryExhausted: there is too little memory.
        """
        limits, decoder = self._limits, self._decoder
        if limits.session_bytes == 0:
            self._pool = decoder.new_pool(0)
            return self._pool
        size, pool = self._claim(limits.session_bytes)
        if pool.tokens < tokens_held(decoder, size):
            size = pool.tokens * pool.token_bytes
        log.info("session memory %s: %s tokens of KV", format_bytes(size), f"{pool.tokens:,}")
        if pool.tokens < decoder.spec.context_length:
            log.warning(
                "session memory holds %s tokens of KV, less than one session of the full context "
                "of %s: longer requests are refused",
                f"{pool.tokens:,}",
                f"{decoder.spec.context_length:,}",
            )
        self.budget.limit, self.budget.idle_limit = size, limits.idle_bytes_of(size)
        self._pool = pool
        return pool

    def _claim(self, size: int | None) -> tuple[int, KvPool]:
        """Bytes for sessions, ``size`` or a fraction of what is free, and their pool."""
        limits, decoder = self._limits, self._decoder
        fraction = fraction_of(decoder.device, limits.memory_fraction)
        if decoder.backend.claims_memory:
            share = DeviceShare(decoder, limits.chunk_tokens)
            graphs = graph_bytes(decoder, step_rows(limits.max_sessions), tails=self._tails)
            claimed = share.claim(fraction, size, graphs, self._new_pool)
            self._share = share
            return claimed
        if size is None:
            size = budget_from_cpu(decoder, fraction, limits.chunk_tokens)
        return size, self._new_pool(size)

    def _new_pool(self, size: int) -> KvPool:
        """A pool of up to ``size`` bytes."""
        most = LARGEST_STRIDE // self._decoder.spec.head_dim - 1
        return self._decoder.new_pool(min(tokens_held(self._decoder, size), most))

    def close(self) -> None:
        """Frees everything, once all sessions have ended."""
        self._pool = None
        if self._share is not None:
            self._share.release()

    # -- caches ----------------------------------------------------------------------------------

    def kv_bytes(self, tokens: int) -> int:
        """Bytes of a cache for that many tokens."""
        return kv_bytes(self._decoder.spec, self._decoder.dtype, tokens)

    def kept_bytes(self, tokens: int) -> int:
        """Bytes of a session that is kept: a cache for that many tokens, the statistics [3, L,
        F] float32 that its next turn adds to, and the host's objects. Of a session with few tokens
        the statistics are most."""
        spec = self._decoder.spec
        statistics = 12 * len(spec.layers) * spec.intermediate_size
        return self.kv_bytes(tokens) + statistics + OBJECT_BYTES + TOKEN_BYTES * tokens

    def max_bytes(self, tokens: int, *, resized: bool) -> int:
        """The most that a cache for that many tokens comes to hold. To resize it takes a copy of
        one of its layers."""
        size = self.kv_bytes(tokens)
        return size + size // len(self._decoder.layers) if resized else size

    def allocate(self, session: Session) -> None:
        """Gives a session room for its turn: a new cache, or its old one, larger."""
        if session.cache is not None:
            self.resize(session.cache, session.capacity)
            return
        size = self.kv_bytes(session.capacity)
        self.budget.acquire(size)
        try:
            assert self._pool is not None, "no session is admitted before there is memory"
            session.cache = self._pool.allocate(session.capacity)
        except BaseException:
            self.budget.release(size)
            raise

    def resize(self, cache: KvCache, capacity: int) -> None:
        """Makes a cache larger or smaller.

        Args:
            capacity: tokens that it has room for afterwards.
        """
        held, new = cache.nbytes, self.kv_bytes(capacity)
        acquired = max(0, new - held) + held // len(self._decoder.layers)
        self.budget.acquire(acquired)
        try:
            cache.resize(capacity)
        finally:
            self.budget.release(held + acquired - cache.nbytes)

    def free(self, session: Session) -> None:
        """Frees a session's cache, if it has one."""
        if session.cache is not None:
            self.budget.release(session.cache.nbytes)
            session.cache.free()
            session.cache = None
