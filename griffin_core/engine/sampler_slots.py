"""The slots of the sampler: each generating session has one."""

from __future__ import annotations

from griffin_core.engine.session import Session
from griffin_core.sampling.params import SamplingParams
from griffin_core.sampling.sampler import Sampler


class SamplerSlots:
    """Gives sessions slots of a sampler and takes them back. Owned by the engine's thread."""

    def __init__(self, sampler: Sampler, count: int) -> None:
        self._sampler = sampler
        self._free = list(reversed(range(count)))

    @property
    def free(self) -> tuple[int, ...]:
        """Slots that belong to no session."""
        return tuple(self._free)

    def acquire(self, session: Session, params: SamplingParams) -> None:
        """Gives a session a slot, set up for its request and its tokens so far."""
        session.slot = self._free.pop()
        self._sampler.open(session.slot, params, session.tokens)

    def release(self, session: Session) -> None:
        """Takes a session's slot back, if it has one."""
        if session.slot is not None:
            self._sampler.close(session.slot)
            self._free.append(session.slot)
            session.slot = None
