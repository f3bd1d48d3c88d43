"""Weights as they are loaded, before a backend lays them out."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from griffin_core.spec.model import Activation, NormKind


@dataclass(frozen=True, kw_only=True)
class Norm:
    """RMSNorm (no bias) or LayerNorm over the last dimension, computed in float32.

    Args:
        weight: [D] float32, with any offset of the family already added; None for all ones.
        bias: [D] float32; LayerNorm only.
    """

    kind: NormKind
    eps: float
    weight: Tensor | None
    bias: Tensor | None = None


@dataclass(frozen=True, kw_only=True)
class FFWeights:
    """The weights of one FF block, stored neuron-major: row f of every matrix belongs to neuron f.

    Gated: ``Z = act(x gateᵀ) · (x upᵀ)``; plain: ``Z = act(x upᵀ + up_bias)``; output ``Z down``.

    Args:
        w_in: [2, F, D], gate then up; [1, F, D], up alone, for a plain FF.
        down: [F, D], the transpose of the usual W_down, so that a neuron is one contiguous row.
        up_bias: [F] or None; plain FF only.
        down_bias: [D] or None.
    """

    activation: Activation
    w_in: Tensor
    down: Tensor
    up_bias: Tensor | None = None
    down_bias: Tensor | None = None

    @property
    def count(self) -> int:
        """Number of neurons: F, or K after ``gather``."""
        return self.down.shape[0]

    @property
    def gated(self) -> bool:
        return self.w_in.shape[0] == 2

    @property
    def nbytes(self) -> int:
        """Size of the weights in bytes."""
        tensors = (self.w_in, self.down, self.up_bias, self.down_bias)
        return sum(t.numel() * t.element_size() for t in tensors if t is not None)

    def gather(self, experts: Tensor) -> FFWeights:
        """Copies some neurons: experts [K] integers -> FFWeights of K neurons."""
        index = experts.to(self.down.device, torch.int64)
        return FFWeights(
            activation=self.activation,
            w_in=self.w_in[:, index],
            down=self.down[index],
            up_bias=None if self.up_bias is None else self.up_bias[index],
            down_bias=self.down_bias,
        )

    def magnitude(self) -> Tensor:
        """Returns the static strength of each neuron, [F] float32: the l2 norm of its row of W_1,
        or for a gated FF the product of the norms of its rows of W_gate and W_up (the baseline of
        arXiv 2404.01365, section 5)."""
        norms: Tensor = torch.linalg.vector_norm(self.w_in, dim=2, dtype=torch.float32)
        return norms.prod(dim=0)
