"""From a prefill's events to a session that can generate."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from griffin_core.engine.session import Session
from griffin_core.errors import HandoffBroken
from griffin_core.experts.correction import Correction
from griffin_core.experts.slim_spec import SlimSpec
from griffin_core.experts.statistic import Statistics
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
        experts: the number of experts of all layers together.
    """

    def __init__(
        self,
        decoder: Decoder,
        cache: KvCache,
        *,
        tokens: int,
        experts: int,
    ) -> None:
        layers = len(decoder.layers)
        self.tokens = tokens
        self._decoder = decoder
        self._cache = cache
        self._expected = experts
        self._received = [0] * layers
        self._experts: list[LayerExperts | None] = [None] * layers
        shape = (3, layers, decoder.spec.intermediate_size)
        self._sums = torch.zeros(shape, device=decoder.device)
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
        if event.sums.shape != (3, neurons) or not 0 < event.experts.numel() <= neurons:
            raise HandoffBroken(
                f"handoff: layer {event.layer} has {event.experts.numel()} experts and sums "
                f"{tuple(event.sums.shape)}; expected 1 to {neurons}, and (3, {neurons})"
            )
        self._experts[event.layer] = event
        self._sums[:, event.layer] = event.sums.to(self._sums.device)

    def finish(self, session: Session) -> None:
        """Moves what was collected into the session.

        Raises:
            HandoffBroken: something did not come, or is not finite.
        """
        if self._own is not None:
            own = self._own
            session.chosen(own.statistics, own.slim, own.norm_mass, own.tails)
            return
        experts = [layer for layer in self._experts if layer is not None]
        missing = len(self._experts) - len(experts)
        if missing or any(n != self.tokens for n in self._received):
            raise HandoffBroken(
                f"handoff: finished with the experts of {len(experts)} of {len(self._experts)} "
                f"layers and {min(self._received)} of {self.tokens} tokens"
            )
        counts = tuple(layer.experts.numel() for layer in experts)
        if sum(counts) != self._expected:
            raise HandoffBroken(
                f"handoff: got {sum(counts)} experts in all; expected {self._expected}"
            )
        if not self._finite & torch.isfinite(self._sums).all():
            raise HandoffBroken("handoff: got NaN or an infinite value; allowed: finite KV and s")
        self._cache.advance(self.tokens)
        slim = SlimSpec(
            intermediate_size=self._decoder.spec.intermediate_size,
            counts=counts,
            experts=torch.cat([layer.experts for layer in experts]),
            correction=self._correction(experts),
        )
        statistics = Statistics(sums=self._sums, tokens=self.tokens)
        session.chosen(statistics, slim.to(self._sums.device))

    def _correction(self, layers: Sequence[LayerExperts]) -> Correction | None:
        """The corrections of all layers, joined; None if there are none.

        Raises:
            HandoffBroken: some layers have one and some do not, or their ranks differ.
        """
        own = [layer.correction for layer in layers if layer.correction is not None]
        if not own:
            return None
        if len(own) < len(layers):
            raise HandoffBroken(
                f"handoff: got the corrections of {len(own)} of {len(layers)} layers"
            )
        try:
            return Correction.of_layers(own)
        except ValueError as error:
            raise HandoffBroken(f"handoff: {error}") from error
