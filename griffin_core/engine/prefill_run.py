"""A prompt that waits for the model or is being read."""

from __future__ import annotations

import time
from collections.abc import Callable

from griffin_core.engine.events import PrefillBegun, PrefillStreamEvent
from griffin_core.engine.ports import Sink
from griffin_core.engine.task import MAX_CONCURRENT_PREFILLS
from griffin_core.forward.prompt import (
    Prompt,
)
from griffin_core.forward.prompt_pass import PromptRead


class PrefillRun:
    """A prompt in the queue.

    Args:
        make: makes the prompt, and allocates its memory, when its first pass begins.
        sink: gets PrefillBegun, what ``Prompt`` was asked to tell, then the statistic and the
            experts (for an admitted session as PromptExperts, otherwise as a LayerExperts for each
            layer, on the CPU), then PrefillFinished or Failed.
        tokens: T of the prompt.
        admitted: whether it writes the cache of a session that this engine has admitted.
        is_prompt: whether the tokens are a prompt; otherwise they were read before.
        max_concurrent, owner: as in PrefillTask.
    """

    def __init__(
        self,
        make: Callable[[], Prompt],
        sink: Sink[PrefillStreamEvent],
        *,
        tokens: int,
        admitted: bool,
        is_prompt: bool = True,
        max_concurrent: int = MAX_CONCURRENT_PREFILLS,
        owner: str = "",
    ) -> None:
        self._make = make
        self._tokens = tokens
        self._arrived = time.monotonic()
        self.prompt: Prompt | None = None
        self.sink = sink
        self.admitted = admitted
        self.is_prompt = is_prompt
        self.max_concurrent = max_concurrent
        self.owner = owner
        self.cancelled = False

    @property
    def owns_cache(self) -> bool:
        """Whether it has a KV cache of its own."""
        return self.prompt is not None and not self.admitted

    @property
    def left(self) -> int:
        """Tokens still to read."""
        return self._tokens if self.prompt is None else self.prompt.left

    def cancel(self) -> None:
        """From any thread: it joins no further pass, and no event follows the one being made."""
        self.cancelled = True

    def begin(self) -> Prompt:
        """The prompt, which is made now if this is its first pass."""
        if self.prompt is None:
            self.tell(PrefillBegun(queue_s=time.monotonic() - self._arrived))
            self.prompt = self._make()
        return self.prompt

    def tell(self, event: PrefillStreamEvent) -> None:
        """Hands its sink an event, unless it was cancelled."""
        if not self.cancelled:
            self.sink.put(event)

    def tell_experts(self, read: PromptRead) -> None:
        """Hands its sink the statistic and the experts."""
        if self.admitted:
            self.tell(read.in_one_piece())
        else:
            for layer in read.by_layer():
                self.tell(layer)
