"""The feedforward (FF) block, dense or on a subset of its neurons: the same code, fewer rows."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from griffin_core.model.spec import Activation

ACTIVATIONS: dict[Activation, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
    "relu": F.relu,
}


@dataclass(frozen=True, kw_only=True)
class FeedForward:
    """Weights of one FF block, stored neuron-major: row f of every matrix belongs to neuron f.

    Gated: ``Z = act(x gateᵀ) · (x upᵀ)``; plain: ``Z = act(x upᵀ + up_bias)``; output ``Z down``.

    Args:
        gate: [F, D], or None for a plain FF.
        up: [F, D].
        down: [F, D]: the transpose of the usual W_down, so that a neuron is one contiguous row.
        up_bias: [F] or None.
        down_bias: [D] or None.
    """

    activation: Activation
    gate: Tensor | None
    up: Tensor
    down: Tensor
    up_bias: Tensor | None = None
    down_bias: Tensor | None = None

    @property
    def neurons(self) -> int:
        """F, or K after ``take``."""
        return self.up.shape[0]

    @property
    def nbytes(self) -> int:
        """Bytes of the weights."""
        tensors = (self.gate, self.up, self.down, self.up_bias, self.down_bias)
        return sum(t.numel() * t.element_size() for t in tensors if t is not None)

    def activations(self, x: Tensor) -> Tensor:
        """[T, D] -> Z [T, F], what the statistic is taken of."""
        act = ACTIVATIONS[self.activation]
        up = F.linear(x, self.up, self.up_bias)
        return act(up) if self.gate is None else act(F.linear(x, self.gate)).mul_(up)

    def output(self, z: Tensor) -> Tensor:
        """Z [T, F] -> [T, D]."""
        return F.linear(z, self.down.t(), self.down_bias)

    def __call__(self, x: Tensor) -> Tensor:
        """[T, D] -> [T, D]."""
        return self.output(self.activations(x))

    def take(self, experts: Tensor) -> FeedForward:
        """A copy that holds only the given neurons: experts [K] -> FF of width K."""
        index = experts.long()
        return FeedForward(
            activation=self.activation,
            gate=None if self.gate is None else self.gate[index],
            up=self.up[index],
            down=self.down[index],
            up_bias=None if self.up_bias is None else self.up_bias[index],
            down_bias=self.down_bias,
        )

    def magnitude(self) -> Tensor:
        """Static strength of each neuron, [F] float32: the l2 norm of its row of W_1, or for a
        gated FF the product of the norms of its rows of W_gate and W_up (the baseline of arXiv
        2404.01365, section 5)."""
        norm = partial(torch.linalg.vector_norm, dim=1, dtype=torch.float32)
        up: Tensor = norm(self.up)
        return up if self.gate is None else up * norm(self.gate)
