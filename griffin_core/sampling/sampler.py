"""One draw for all sessions of a step, where their logits are."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from griffin_core.backends.base import Backend
from griffin_core.sampling.params import SamplingParams


class Sampler:
    """Draws the tokens of a batch: logit bias, repetition penalty, presence and frequency
    penalties, allowed and banned tokens, temperature, top_k, top_p, min_p, and the draw, in this
    order.

    A slot holds what one session's draws need. Slot ``slots`` is for rows of a captured step that
    belong to no session; it is greedy, and its tokens mean nothing.

    A draw depends on the logits, the slot's parameters, what the slot has seen, and the random bits
    of (seed, position, token), never on the rows beside it. On a GPU a call makes the same launches
    on the same state each time, so it can be captured in a CUDA graph.

    Args:
        slots: most sessions at once.
        vocabulary: V.
        backend: where the logits are.
    """

    def __init__(self, *, slots: int, vocabulary: int, backend: Backend) -> None:
        self.padding = slots
        """The slot of rows that belong to no session."""
        self._slots = backend.sampler_slots(slots, vocabulary)

    @property
    def drawn(self) -> Tensor:
        """[slots + 1] int64 on the device: the token that each slot drew last; -1 if its logits
        were not finite. Always the same memory."""
        return self._slots.drawn

    @property
    def nbytes(self) -> int:
        """Bytes of all slots: on a GPU about 8 · (slots + 1) · V, from the start; on a CPU what the
        open slots need."""
        return self._slots.nbytes

    @property
    def in_use(self) -> frozenset[int]:
        """Slots that hold something of a request. A plain greedy request leaves nothing in its
        slot. On a GPU this waits for the device."""
        return self._slots.in_use

    def open(self, slot: int, params: SamplingParams, seen: Sequence[int]) -> None:
        """Gives a slot to a request. In the order of the device's work; nothing waits for it.

        Args:
            seen: tokens of the prompt and of earlier turns: the repetition penalty counts them, the
                presence and frequency penalties count only what is drawn from now on.
        """
        self._slots.open(slot, params, seen)

    def ban(self, slot: int, tokens: Sequence[int]) -> None:
        """Sets which tokens a slot does not draw from now on, whatever it was told before. In the
        order of the device's work; nothing waits for it. ``open`` leaves none banned.

        Args:
            tokens: at least one of those that the request allows is not among them.
        """
        self._slots.ban(slot, tokens)

    def close(self, slot: int) -> None:
        """Leaves a slot without anything of its request."""
        self._slots.close(slot)

    def sample(self, logits: Tensor, slots: Tensor, positions: Tensor) -> Tensor:
        """Draws a token for each row, leaves it in ``drawn``, and counts it for the penalties.

        Args:
            logits: [N, V] float32, contiguous; left as they are.
            slots: [N] int64 on the device: whose row it is; no slot twice but ``slots``.
            positions: [N] int64 on the device: index in its sequence of the token that is drawn.

        Returns:
            [N] int64 on the device: the tokens; at temperature 0 the likeliest, of equals the one
            with the lowest id; -1 for a row with a logit that is NaN or infinite.
        """
        return self._slots.sample(logits, slots, positions)
