"""The sampler: draws the tokens of all sessions of a step on the device of their logits."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from griffin_core.backends.base import Backend
from griffin_core.sampling.params import SamplingParams


class Sampler:
    """Draws the tokens of a batch: logit bias, repetition penalty, presence and frequency
    penalties, allowed and banned tokens, temperature, top_k, top_p, min_p, and the random draw, in
    this order.

    A slot holds the sampling state of one session. Slot ``slots`` is for the padding rows of a
    captured step; it is greedy, and its tokens are ignored.

    A draw depends on the logits, the slot's parameters, the tokens that the slot has seen, and the
    random bits of (seed, position, token), never on other rows. On a GPU every call makes the same
    launches on the same memory, so it can be captured in a CUDA graph.

    Args:
        slots: the most sessions at once.
        vocab_size: V.
        backend: the backend of the logits' device.
    """

    def __init__(self, *, slots: int, vocab_size: int, backend: Backend) -> None:
        self.padding = slots
        """The slot of padding rows."""
        self._slots = backend.sampler_slots(slots, vocab_size)

    @property
    def drawn(self) -> Tensor:
        """[slots + 1] int64 on the device: the token that each slot drew last; -1 if its logits
        were not finite. Its address never changes."""
        return self._slots.drawn

    @property
    def nbytes(self) -> int:
        """Size of all slots in bytes: on a GPU about 8 · (slots + 1) · V, allocated at start; on a
        CPU the bytes of the open slots."""
        return self._slots.nbytes

    @property
    def in_use(self) -> frozenset[int]:
        """The slots that hold state of a request. A plain greedy request needs no state. On a GPU
        this waits for the device."""
        return self._slots.in_use

    def open(self, slot: int, params: SamplingParams, seen: Sequence[int]) -> None:
        """Assigns a slot to a request, in stream order and without waiting.

        Args:
            seen: tokens of the prompt and of earlier turns. The repetition penalty counts them; the
                presence and frequency penalties count only tokens drawn from now on.
        """
        self._slots.open(slot, params, seen)

    def ban(self, slot: int, tokens: Sequence[int]) -> None:
        """Replaces the tokens that a slot must not draw from now on, in stream order and without
        waiting. After ``open`` no token is banned.

        Args:
            tokens: the banned tokens. At least one of the request's allowed tokens is not banned.
        """
        self._slots.ban(slot, tokens)

    def count(self, slot: int, tokens: Sequence[int], times: int) -> None:
        """Counts tokens for a slot's penalties as if it had drawn them, or as if it had not, in
        stream order and without waiting.

        Args:
            times: 1 or -1.
        """
        self._slots.count(slot, tokens, times)

    def close(self, slot: int) -> None:
        """Clears the state of a slot."""
        self._slots.close(slot)

    def sample(self, logits: Tensor, slots: Tensor, positions: Tensor) -> Tensor:
        """Draws a token for each row, stores it in ``drawn``, and counts it for the penalties.

        Args:
            logits: [N, V] float32, contiguous; not modified.
            slots: [N] int64 on the device: the slot of each row. A slot may be repeated if it has
                no penalties, and slot ``slots`` always; what a repeated slot drew last is then one
                of its tokens.
            positions: [N] int64 on the device: the index of the drawn token in its sequence.

        Returns:
            The tokens, [N] int64 on the device. At temperature 0 the argmax, where ties go to the
            lowest id; -1 for a row with a logit that is NaN or infinite.
        """
        return self._slots.sample(logits, slots, positions)
