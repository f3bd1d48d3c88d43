"""From a prefill's events to a session that can generate."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from griffin_core.engine.session import Session
from griffin_core.errors import HandoffBroken
from griffin_core.experts.slim_spec import SlimSpec
from griffin_core.forward.events import (
    LayerExperts,
    LayerKv,
    PromptExperts,
)
from griffin_core.kv.cache import KvCache
from griffin_core.model.decoder import Decoder


class HandoffReceiver:
    """Collects a session's state from the events of a prefill, in whatever order layers come.

    Nothing of it reaches the session before ``PrefillFinished`` has come and everything was there.

    A handoff brings KV, statistic and experts layer by layer. A prompt that this engine reads
    itself has its KV in the session's cache, and the rest comes in one piece.

    Args:
        cache: of the session.
        tokens: T, the tokens that the prefill must bring in every layer.
        counts: K of each layer.
    """

    def __init__(
        self,
        decoder: Decoder,
        cache: KvCache,
        *,
        tokens: int,
        counts: Sequence[int],
    ) -> None:
        layers = len(decoder.layers)
        self.tokens = tokens
        self._decoder = decoder
        self._cache = cache
        self._counts = counts
        self._received = [0] * layers
        self._experts: list[Tensor | None] = [None] * layers
        self._s2 = torch.zeros(layers, decoder.spec.intermediate_size, device=decoder.device)
        self._own: PromptExperts | None = None
        self._finite = torch.ones((), dtype=torch.bool, device=decoder.device)
        """Whether all KV so far is finite. It stays on the device, so that nothing waits for it."""

    @property
    def received(self) -> tuple[int, ...]:
        """For each layer, the tokens whose KV has been handed over so far."""
        return tuple(self._received)

    def receive(self, event: LayerKv | LayerExperts | PromptExperts) -> None:
        """Takes one layer's KV or experts, or the experts of a prompt that this engine has read.

        Raises:
            HandoffBroken: it is not what this session waits for.
        """
        if isinstance(event, PromptExperts):
            self._own = event
            return
        if not 0 <= event.layer < len(self._experts):
            raise HandoffBroken(f"handoff: got layer {event.layer} of {len(self._experts)}")
        if isinstance(event, LayerKv):
            self._receive_kv(event)
        else:
            self._receive_experts(event)

    def _receive_kv(self, event: LayerKv) -> None:
        tokens = event.kv.shape[2]
        received = self._received[event.layer]
        if event.first_token != received:
            raise HandoffBroken(
                f"handoff: layer {event.layer} goes on at token {event.first_token}; "
                f"expected {received}"
            )
        if received + tokens > self.tokens:
            raise HandoffBroken(f"handoff: layer {event.layer} has over {self.tokens} tokens")
        if event.ready is not None:  # it comes on another stream
            stream = torch.cuda.current_stream()
            stream.wait_event(event.ready)
            event.kv.record_stream(stream)
        place = self._cache.slice(event.layer, received, received + tokens)
        place.copy_(event.kv)
        low, high = torch.aminmax(place)  # NaN if a value is
        self._finite &= torch.isfinite(low) & torch.isfinite(high)
        self._received[event.layer] += tokens

    def _receive_experts(self, event: LayerExperts) -> None:
        neurons = self._decoder.spec.intermediate_size
        k = self._counts[event.layer]
        if event.experts.numel() != k or event.s2.shape != (neurons,):
            raise HandoffBroken(
                f"handoff: layer {event.layer} has {event.experts.numel()} experts of "
                f"{event.s2.numel()} neurons; expected {k} of {neurons}"
            )
        self._experts[event.layer] = event.experts
        self._s2[event.layer] = event.s2.to(self._s2.device)

    def finish(self, session: Session) -> None:
        """Moves what was collected into the session.

        Raises:
            HandoffBroken: something did not come, or is not finite.
        """
        if self._own is not None:
            session.chosen(self._own.s2, self._own.slim, self._own.norm_mass)
            return
        experts = [layer for layer in self._experts if layer is not None]
        missing = len(self._experts) - len(experts)
        if missing or any(n != self.tokens for n in self._received):
            raise HandoffBroken(
                f"handoff: finished with the experts of {len(experts)} of {len(self._experts)} "
                f"layers and {min(self._received)} of {self.tokens} tokens"
            )
        if not self._finite & torch.isfinite(self._s2).all():
            raise HandoffBroken("handoff: got NaN or an infinite value; allowed: finite KV and s")
        self._cache.advance(self.tokens)
        there = torch.cat(experts).to(self._s2.device)
        slim = SlimSpec(
            intermediate_size=self._s2.shape[1], counts=tuple(self._counts), experts=there
        )
        session.chosen(self._s2, slim)
