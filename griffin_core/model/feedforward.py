"""The feedforward (FF) block, dense or on a subset of its neurons: the same code, fewer rows."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from griffin_core.backends.cpu.rows import ACTIVATION_CODES, feedforward_row
from griffin_core.backends.cpu.team import runs_kernels
from griffin_core.backends.cuda import runs_cuda_kernels
from griffin_core.model.linear import Linear, Rows, linear_bytes
from griffin_core.spec.model import Activation

ACTIVATIONS: dict[Activation, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
    "relu": F.relu,
}


@dataclass(frozen=True, kw_only=True)
class Neurons:
    """Weights of one FF block, stored neuron-major: row f of every matrix belongs to neuron f.

    Gated: ``Z = act(x gateᵀ) · (x upᵀ)``; plain: ``Z = act(x upᵀ + up_bias)``; output ``Z down``.

    Args:
        w_in: [2, F, D], gate then up; [1, F, D], up alone, for a plain FF.
        down: [F, D]: the transpose of the usual W_down, so that a neuron is one contiguous row.
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
        """F, or K after ``take``."""
        return self.down.shape[0]

    @property
    def gated(self) -> bool:
        return self.w_in.shape[0] == 2

    @property
    def nbytes(self) -> int:
        """Bytes of the weights."""
        tensors = (self.w_in, self.down, self.up_bias, self.down_bias)
        return sum(t.numel() * t.element_size() for t in tensors if t is not None)

    def take(self, experts: Tensor) -> Neurons:
        """A copy of the given neurons: experts [K] -> Neurons of K."""
        index = experts.long()
        return Neurons(
            activation=self.activation,
            w_in=self.w_in[:, index],
            down=self.down[index],
            up_bias=None if self.up_bias is None else self.up_bias[index],
            down_bias=self.down_bias,
        )

    def magnitude(self) -> Tensor:
        """Static strength of each neuron, [F] float32: the l2 norm of its row of W_1, or for a
        gated FF the product of the norms of its rows of W_gate and W_up (the baseline of arXiv
        2404.01365, section 5)."""
        norms: Tensor = torch.linalg.vector_norm(self.w_in, dim=2, dtype=torch.float32)
        return norms.prod(dim=0)


class FeedForward:
    """An FF block ready to run.

    Args:
        neurons: all of a layer's, or a copy of some.
        rows: what it is laid out for. Unless that is "one" the block holds copies of the weights
            where the device wants them laid out otherwise.
    """

    def __init__(self, neurons: Neurons, rows: Rows = "any") -> None:
        self._activation = ACTIVATIONS[neurons.activation]
        self._code = ACTIVATION_CODES[neurons.activation]
        self._gated = neurons.gated
        has_kernel = runs_kernels(neurons.down.dtype, neurons.down.device)
        self._row = neurons if has_kernel and rows != "many" else None
        layout: Rows = "many" if rows == "any" else rows
        self._in = Linear(neurons.w_in.flatten(0, 1), neurons.up_bias, rows=layout)
        self._out = Linear(neurons.down.t(), neurons.down_bias, rows=layout)

    def activations(self, x: Tensor) -> Tensor:
        """[T, D] -> Z [T, F], what the statistic is taken of."""
        return self.activations_and_squares(x)[0]

    def activations_and_squares(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """[T, D] -> Z [T, F], and its rows' squares [T, n] float32, of which each row sums to
        ‖Z_t‖², where they come with Z for nothing; else None."""
        h = self.inner(x)
        if runs_cuda_kernels(h.dtype, h.device):
            from griffin_core.backends.cuda.activation import activate_rows  # noqa: PLC0415  # needs triton

            return activate_rows(h, self._code, gated=self._gated)
        return self._activated(h), None

    def _activated(self, h: Tensor) -> Tensor:
        """What ``inner`` gives -> Z [T, F]."""
        if not self._gated:
            return self._activation(h)
        gate, up = h.chunk(2, dim=-1)
        return self._activation(gate).mul_(up)

    def zeroed(self, x: Tensor, keep: Tensor) -> Tensor:
        """[T, D] -> [T, D], the last n rows on some neurons only.

        Args:
            keep: [n, F] of x's dtype, n <= T: 1 for the neurons that a row runs on, else 0.
        """
        z = self.activations(x)
        z[z.shape[0] - keep.shape[0] :] *= keep
        return self.output(z)

    def apart(self, x: Tensor, keep: Tensor | None) -> Tensor:
        """As ``zeroed``, or on all neurons if ``keep`` is None, with each row activated by itself.
        A vector of values and the few left over at the end of a tensor are rounded differently, so
        a row's activations would depend on where it stands."""
        z = torch.stack([self._activated(row) for row in self.inner(x).unbind()])
        if keep is not None:
            z[z.shape[0] - keep.shape[0] :] *= keep
        return self.output(z)

    def inner(self, x: Tensor) -> Tensor:
        """[T, D] -> what the activation is taken of: [T, 2F], gate and up beside each other, or
        [T, F] of a plain FF."""
        return self._in(x)

    def output(self, z: Tensor) -> Tensor:
        """Z [T, F] -> [T, D]."""
        return self._out(z)

    def __call__(self, x: Tensor) -> Tensor:
        """[T, D] -> [T, D]."""
        if self._row is not None and x.shape[0] == 1:
            return self._of_row(x, self._row, None)
        return self.output(self.activations(x))

    def on(self, x: Tensor, keep: Tensor) -> Tensor:
        """[T, D] -> [T, D], all rows on the neurons ``keep`` [F] bool."""
        if self._row is not None and x.shape[0] == 1:
            return self._of_row(x, self._row, keep)
        return self.output(self.activations(x).mul_(keep))

    def _of_row(self, x: Tensor, n: Neurons, keep: Tensor | None) -> Tensor:
        return feedforward_row(x, n.w_in, n.down, n.up_bias, n.down_bias, self._code, keep)


def feedforward_bytes(neurons: Neurons, k: int) -> int:
    """Most bytes a FeedForward of k of these neurons holds."""
    width, dtype = neurons.down.shape[1], neurons.down.dtype
    biases = ((neurons.up_bias, k), (neurons.down_bias, width))
    return (
        linear_bytes(neurons.w_in.shape[0] * k, width, dtype)
        + linear_bytes(width, k, dtype)
        + sum(n * dtype.itemsize for bias, n in biases if bias is not None)
    )
