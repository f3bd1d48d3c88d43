"""The KV caches of sessions, and their bytes: what is counted as held is what is there."""

from __future__ import annotations

from griffin_core.engine.sessions import Session
from griffin_core.kv.budget import Budget
from griffin_core.kv.cache import KvCache
from griffin_core.kv.pool import KvPool, kv_bytes
from griffin_core.model.decoder import Decoder


class Caches:
    """Makes, resizes and frees sessions' caches.

    Args:
        budget: what their bytes are taken from.
    """

    def __init__(self, decoder: Decoder, budget: Budget) -> None:
        self._decoder = decoder
        self._budget = budget
        self._pool: KvPool | None = None

    def open(self, pool: KvPool) -> None:
        """Sets the pool that caches are allocated from, which has a slot for every token that the
        budget allows."""
        self._pool = pool

    def close(self) -> None:
        """Lets go of the pool."""
        self._pool = None

    def nbytes(self, tokens: int) -> int:
        """Bytes of a cache for that many tokens."""
        return kv_bytes(self._decoder.spec, self._decoder.dtype, tokens)

    def kept_bytes(self, tokens: int) -> int:
        """Bytes of a session that is kept: a cache for that many tokens, and the statistic [L, F]
        float32 that its next turn adds to, which is most of what a session of few tokens holds."""
        spec = self._decoder.spec
        return self.nbytes(tokens) + 4 * len(spec.layers) * spec.ff_width

    def most_bytes(self, tokens: int, *, resized: bool) -> int:
        """The most that a cache for that many tokens comes to hold, with the copy of a layer that
        it takes to resize it."""
        size = self.nbytes(tokens)
        return size + size // len(self._decoder.layers) if resized else size

    def prepare(self, session: Session) -> None:
        """Gives a session room for its turn: a new cache, or its old one, larger."""
        if session.cache is not None:
            self.resize(session.cache, session.capacity)
            return
        size = self.nbytes(session.capacity)
        self._budget.take(size)
        try:
            assert self._pool is not None, "no session is admitted before there is memory"
            session.cache = self._pool.allocate(session.capacity)
        except BaseException:
            self._budget.give_back(size)
            raise

    def resize(self, cache: KvCache, capacity: int) -> None:
        """Makes room in a cache, or gives room back."""
        held, new = cache.nbytes, self.nbytes(capacity)
        taken = max(0, new - held) + held // len(self._decoder.layers)
        self._budget.take(taken)
        try:
            cache.resize(capacity)
        finally:
            self._budget.give_back(held + taken - cache.nbytes)

    def free(self, session: Session) -> None:
        """Drops a session's cache, if it has one."""
        if session.cache is not None:
            self._budget.give_back(session.cache.nbytes)
            session.cache.free()
            session.cache = None
