"""How far a handoff has come, and whether a message is the one that comes next."""

from __future__ import annotations

from griffin_core.errors import HandoffBroken
from griffin_core.forward.events import LayerExperts, LayerKv
from griffin_server.transfer.shape import HandoffShape


class Progress:
    """What has come of a handoff of this shape. A handoff that breaks here, before the engine has
    it, is tried on another prefill server."""

    def __init__(self, shape: HandoffShape) -> None:
        self._shape = shape
        self._tokens = [0] * shape.layers
        self._chosen = [False] * shape.layers
        self._experts_left = shape.experts
        self._ranks: set[int | None] = set()  # of corrections; None for none

    def kv(self, event: LayerKv) -> None:
        """Takes note of KV.

        Raises:
            HandoffBroken: it is not that of the layer's next tokens.
        """
        layer, tokens = self._layer(event.layer), event.kv.shape[2]
        if event.first_token != self._tokens[layer]:
            raise HandoffBroken(
                f"handoff: layer {layer} goes on at token {event.first_token}; expected "
                f"{self._tokens[layer]}"
            )
        self._tokens[layer] += tokens
        if self._tokens[layer] > self._shape.tokens:
            raise HandoffBroken(f"handoff: layer {layer} has over {self._shape.tokens} tokens")

    def experts(self, event: LayerExperts) -> None:
        """Takes note of a layer's statistic and experts.

        Raises:
            HandoffBroken: they came before, or are not as many as they should be.
        """
        layer, shape, k = self._layer(event.layer), self._shape, event.experts.numel()
        mean = shape.experts // shape.layers
        least, most = (-(-mean // 2), shape.ff_width) if shape.uneven else (mean, mean)
        if not least <= k <= most:
            raise HandoffBroken(
                f"handoff: layer {layer} has {k} experts; expected {least} to {most}"
            )
        rank = None if event.correction is None else event.correction.rank
        if self._ranks and rank not in self._ranks:
            raise HandoffBroken(f"handoff: the correction of layer {layer} is of another kind")
        self._ranks.add(rank)
        self._experts_left -= k
        if self._experts_left < 0:
            raise HandoffBroken(f"handoff: got over {self._shape.experts} experts")
        if self._chosen[layer]:
            raise HandoffBroken(f"handoff: the experts of layer {layer} came twice")
        self._chosen[layer] = True

    def finish(self) -> None:
        """Takes note of the end.

        Raises:
            HandoffBroken: something has not come.
        """
        if all(self._chosen) and self._experts_left:
            raise HandoffBroken(
                f"handoff: got {self._shape.experts - self._experts_left} of "
                f"{self._shape.experts} experts"
            )
        if not all(self._chosen) or min(self._tokens) < self._shape.tokens:
            raise HandoffBroken(
                f"handoff: finished with the experts of {sum(self._chosen)} of "
                f"{self._shape.layers} layers and {min(self._tokens)} of {self._shape.tokens} "
                "tokens"
            )

    def _layer(self, layer: int) -> int:
        if not 0 <= layer < self._shape.layers:
            raise HandoffBroken(f"handoff: got layer {layer} of {self._shape.layers}")
        return layer
