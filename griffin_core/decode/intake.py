"""From a prefill's events to a session that can generate."""

from __future__ import annotations

import time

import torch
from torch import Tensor

from griffin_core.decode.session import Session
from griffin_core.errors import HandoffBroken
from griffin_core.experts.expert_set import ExpertSet, norm_mass
from griffin_core.kv_cache import KvCache
from griffin_core.model.decoder import Decoder
from griffin_core.prefill import LayerExperts, LayerKv
from griffin_core.slim.base import SlimFF, SlimForm, SlimView


class Intake:
    """Builds a session's state from the events of a prefill, in whatever order layers come.

    Nothing of it reaches the session before ``PrefillFinished`` came and all of it was there.

    Args:
        cache: where the KV goes; None if the prefill writes the session's cache itself.
        tokens: T, which the prefill must bring in every layer.
        experts_per_layer: K.
    """

    def __init__(
        self,
        decoder: Decoder,
        slim: SlimForm,
        cache: KvCache | None,
        *,
        tokens: int,
        experts_per_layer: int,
    ) -> None:
        layers = len(decoder.layers)
        self._decoder = decoder
        self._slim = slim
        self._cache = cache
        self._tokens = tokens
        self._k = experts_per_layer
        self._received = [0] * layers
        self._experts: list[Tensor | None] = [None] * layers
        self._views: list[SlimFF | None] = [None] * layers
        self._s2 = torch.zeros(layers, decoder.spec.ff_width, device=decoder.device)
        self.slim_build_s = 0.0

    def take(self, event: LayerKv | LayerExperts) -> None:
        """Takes one layer's KV or experts.

        Raises:
            HandoffBroken: it is not what this session waits for.
        """
        if not 0 <= event.layer < len(self._views):
            raise HandoffBroken(f"handoff: got layer {event.layer} of {len(self._views)}")
        if isinstance(event, LayerKv):
            self._take_kv(event)
        else:
            self._take_experts(event)

    def _take_kv(self, event: LayerKv) -> None:
        tokens = event.kv.shape[2]
        if self._cache is not None:
            if event.first_token != self._received[event.layer]:
                raise HandoffBroken(
                    f"handoff: layer {event.layer} goes on at token {event.first_token}; "
                    f"expected {self._received[event.layer]}"
                )
            if event.first_token + tokens > self._tokens:
                raise HandoffBroken(f"handoff: layer {event.layer} has over {self._tokens} tokens")
            k, v = event.kv.to(self._decoder.device).transpose(1, 2)
            self._cache.write(event.layer, event.first_token, k, v)
        self._received[event.layer] += tokens

    def _take_experts(self, event: LayerExperts) -> None:
        ff = self._decoder.layers[event.layer].ff
        if event.experts.numel() != self._k or event.s.shape != (ff.neurons,):
            raise HandoffBroken(
                f"handoff: layer {event.layer} has {event.experts.numel()} experts of "
                f"{event.s.numel()} neurons; expected {self._k} of {ff.neurons}"
            )
        clock = time.perf_counter()
        self._views[event.layer] = self._slim.build(ff, event.experts)
        self.slim_build_s += time.perf_counter() - clock
        self._experts[event.layer] = event.experts
        self._s2[event.layer] = event.s.to(self._s2.device).square()

    def finish(self, session: Session) -> None:
        """Moves what was built into the session.

        Raises:
            HandoffBroken: something did not come.
        """
        views = [view for view in self._views if view is not None]
        experts = [layer for layer in self._experts if layer is not None]
        if len(views) < len(self._views) or any(n != self._tokens for n in self._received):
            raise HandoffBroken(
                f"handoff: finished with {len(views)} of {len(self._views)} layers' experts and "
                f"{min(self._received)} of {self._tokens} tokens"
            )
        if self._cache is not None:
            self._cache.advance(self._tokens)
            session.cache = self._cache
        session.s2 = self._s2
        session.experts = ExpertSet(ff_width=self._s2.shape[1], layers=tuple(experts))
        session.view = SlimView(layers=tuple(views))
        session.norm_mass = tuple(
            norm_mass(s2, layer) for s2, layer in zip(self._s2, experts, strict=True)
        )
