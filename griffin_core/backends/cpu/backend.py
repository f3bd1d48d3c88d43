"""The CPU backend: matrix products by oneDNN, and compiled loops for bfloat16."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import torch
from torch import Tensor

from griffin_core.backends.activations import ACTIVATION_CODES
from griffin_core.backends.attention import Rope, ropes_of
from griffin_core.backends.base import Attention, FeedForward, Layout, Linear, SamplerSlots
from griffin_core.backends.batch import RowTable
from griffin_core.backends.cpu.attention import attend_kernel, attend_rows
from griffin_core.backends.cpu.memory import LazyTensors
from griffin_core.backends.cpu.norm import MAX_VALUES, rms_norm
from griffin_core.backends.cpu.rows import feedforward_row, gemv
from griffin_core.backends.cpu.sampler_slots import (
    CpuSlots,
)
from griffin_core.backends.cpu.statistic import sums_of_rows
from griffin_core.backends.cpu.team import compile_kernels, runs_kernels
from griffin_core.backends.torch import TorchBackend, TorchFeedForward
from griffin_core.kv.pool import KvPool
from griffin_core.spec.model import ModelSpec
from griffin_core.spec.weights import FFWeights, Norm

_ROWS_HINT = 16
"""The number of rows that oneDNN is told to choose its weight layout for. Among 1, 4, 16 and 512,
it is the one within 5 % of the best at every number of rows from 1 to 512 (docs/LOG.md)."""

MOST_NEW_TOKENS = 8
"""The most new tokens of a sequence for which the decode attention kernel runs. For more tokens
torch's attention is used, which reads the keys once for all of them."""


class CpuLinear:
    """The weights of a matrix product, in oneDNN's blocked layout. A plain product would reorder
    them, or read them inefficiently, at every call.

    In float32 a row of the result is bitwise independent of the number of other rows. In bfloat16 a
    single row has its own kernel, which reads the weight in its plain layout.

    Args:
        kernels: whether single rows have their own kernel.
    """

    def __init__(
        self, weight: Tensor, bias: Tensor | None, layout: Layout, *, kernels: bool
    ) -> None:
        self.bias = bias
        packs = _onednn_multiplies(weight.dtype) and not (kernels and layout == "gemv")
        self.packed = (
            torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), _ROWS_HINT)
            if packs
            else None
        )
        self.has_row_kernel = kernels and layout != "gemm" and weight.is_contiguous()
        self.weight = weight if self.has_row_kernel or not packs else None


class CpuFeedForward(TorchFeedForward):
    """An FF block with a separate kernel for single rows in bfloat16."""

    def __init__(
        self, backend: CpuBackend, weights: FFWeights, layout: Layout, *, kernels: bool
    ) -> None:
        super().__init__(backend, weights, "gemm" if layout == "both" else layout)
        self._has_row_kernel = kernels and layout != "gemm"

    def __call__(
        self, x: Tensor, norm: Norm | None = None, residual: Tensor | None = None
    ) -> Tensor:
        if self._has_row_kernel and x.shape[0] == 1:
            return self._row(x, None, norm, residual)
        return super().__call__(x, norm, residual)

    def zeroed(
        self, x: Tensor, keep: Tensor, norm: Norm | None = None, residual: Tensor | None = None
    ) -> Tensor:
        if self._has_row_kernel and x.shape[0] == 1 and keep.dtype is torch.bool:
            return self._row(x, keep, norm, residual)
        return super().zeroed(x, keep, norm, residual)

    def _row(
        self, x: Tensor, keep: Tensor | None, norm: Norm | None, residual: Tensor | None
    ) -> Tensor:
        if norm is not None:
            x = self._backend.norm(x, norm)
        w = self.weights
        code = ACTIVATION_CODES[w.activation]
        y = feedforward_row(x, w.w_in, w.down, w.up_bias, w.down_bias, code, keep)
        return y if residual is None else y.add_(residual)


class RowsAttention:
    """Attention for a few new tokens of each sequence over its own KV slots, all in one call."""

    def __init__(
        self, backend: TorchBackend, spec: ModelSpec, pool: KvPool, rows: RowTable
    ) -> None:
        self._backend = backend
        self._spec = spec
        self._pool = pool
        self._rows = rows
        self._ropes: Sequence[Rope] = ropes_of(spec, rows.positions, backend.dtype)

    def __call__(self, layer: int, qkv: Tensor, q_norm: Norm | None, k_norm: Norm | None) -> Tensor:
        spec, own = self._spec, self._spec.layers[layer]
        heads = spec.num_heads
        if q_norm is not None and k_norm is not None:
            q, k = qkv[:, :heads], qkv[:, heads : heads + spec.num_kv_heads]
            q.copy_(self._backend.norm(q, q_norm))
            k.copy_(self._backend.norm(k, k_norm))
        return attend_rows(
            qkv,
            heads,
            None if own.rotary is None else self._ropes[own.rotary],
            self._pool.layers[layer],
            self._rows.kv_slots,
            self._rows.positions,
            window=own.window,
            scale=spec.query_scale,
            softcap=spec.attention_softcap,
        )


class CpuBackend(TorchBackend):
    """See ``Backend``."""

    def __init__(self, device: torch.device, dtype: torch.dtype) -> None:
        super().__init__(device, dtype)
        self._kernels = runs_kernels(dtype, device)

    def prepare(self, spec: ModelSpec) -> None:
        if self._kernels:
            attend_kernel(spec.head_dim, spec.num_heads // spec.num_kv_heads)
            compile_kernels()

    def pack_linear(
        self, weight: Tensor, bias: Tensor | None = None, layout: Layout = "both"
    ) -> Linear:
        return CpuLinear(weight, bias, layout, kernels=self._kernels)

    def pack_ff(self, weights: FFWeights, layout: Layout = "both") -> FeedForward:
        return CpuFeedForward(self, weights, layout, kernels=self._kernels)

    def linear_bytes(self, rows: int, columns: int) -> int:
        # oneDNN pads its blocks.
        return -(-rows // 64) * 64 * (-(-columns // 64) * 64) * self.dtype.itemsize

    def norm(self, x: Tensor, norm: Norm, residual: Tensor | None = None) -> Tensor:
        few = self._kernels and x.numel() <= MAX_VALUES and x.is_contiguous()
        if few and norm.kind == "rms" and norm.weight is not None:
            y = rms_norm(x, norm.weight, norm.eps)
            return y if residual is None else residual + y
        return super().norm(x, norm, residual)

    def multiply(self, x: Tensor, w: Linear) -> Tensor:
        assert isinstance(w, CpuLinear)
        if w.has_row_kernel and x.shape[0] == 1:
            assert w.weight is not None
            return gemv(x, w.weight, w.bias)
        if w.packed is None:
            return super().multiply(x, w)
        y: Tensor = torch.ops.mkldnn._linear_pointwise(x, w.packed, w.bias, "none", [], "")
        return y

    def softcap(self, logits: Tensor, cap: float) -> Tensor:
        # Row by row: the SIMD body and the scalar tail of a tensor round differently, so a row's
        # logits would depend on its place in the batch.
        return torch.stack([cap * torch.tanh(row / cap) for row in logits.unbind()])

    def decode_attention(self, spec: ModelSpec, pool: KvPool, rows: RowTable) -> Attention:
        if self._kernels and rows.most_new_tokens <= MOST_NEW_TOKENS:
            return RowsAttention(self, spec, pool, rows)
        return super().decode_attention(spec, pool, rows)

    def statistic(self, z: Tensor) -> Tensor:
        return sums_of_rows(z) if self._kernels and z.dtype is self.dtype else super().statistic(z)

    def new_pool(self, spec: ModelSpec, tokens: int) -> KvPool:
        shape = (2, spec.num_kv_heads, tokens + 1, spec.head_dim)
        memory = LazyTensors(len(spec.layers), shape, self.dtype)
        return KvPool(memory.tensors, memory.trim)

    def sampler_slots(self, slots: int, vocab_size: int) -> SamplerSlots:
        return CpuSlots(slots=slots, vocab_size=vocab_size)


@cache
def _onednn_multiplies(dtype: torch.dtype) -> bool:
    """Returns whether oneDNN supports matrix products in this dtype on this CPU."""
    if not torch.backends.mkldnn.is_available():
        return False
    if dtype is torch.bfloat16:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    if dtype is torch.float16:
        return bool(torch.ops.mkldnn._is_mkldnn_fp16_supported())
    return dtype is torch.float32
