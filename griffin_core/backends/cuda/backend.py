"""The CUDA backend: Triton kernels for bfloat16 and float16, torch's operations otherwise.

All operations of a step can be captured in a CUDA graph: they read lengths, KV slots and slim ids
from tensors, and never synchronize.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from griffin_core.backends.activations import ACTIVATION_CODES
from griffin_core.backends.attention import Rope, ropes_of
from griffin_core.backends.base import (
    Attention,
    Backend,
    FeedForward,
    Layout,
    Linear,
    SamplerSlots,
    Timestamp,
)
from griffin_core.backends.batch import RowRuns, RowTable
from griffin_core.backends.cuda.activation import activate_own, activate_rows
from griffin_core.backends.cuda.attention import attend_rows, split_plan
from griffin_core.backends.cuda.expert_rows import ExpertRows
from griffin_core.backends.cuda.feedforward import MAX_SHARED_TOKENS, feedforward
from griffin_core.backends.cuda.matvec import matvec, rms_norm
from griffin_core.backends.cuda.rotary import rotate_and_store
from griffin_core.backends.cuda.sampler_slots import (
    CudaSlots,
)
from griffin_core.backends.cuda.statistic import add_sums
from griffin_core.backends.torch import (
    Run,
    TorchAttention,
    TorchBackend,
    TorchFeedForward,
    decode_runs,
    prefill_runs,
)
from griffin_core.kv.cache import KvCache
from griffin_core.kv.pool import KvPool
from griffin_core.spec.model import ModelSpec
from griffin_core.spec.weights import FFWeights, Norm

PROGRAMS = 2
"""Attention programs resident per streaming multiprocessor."""

CHUNK_TOKENS = 4096
"""Prompt tokens in a pass: eight prompts of 512 tokens, which take an 8B model on an H100 about 105
ms. Other sessions wait at most that long."""

MOST_NEW_TOKENS = 8
"""The most new tokens of a sequence for which the decode attention kernel runs in a step that is
not captured. For more tokens torch's attention is used, which reads the keys once for all of
them."""


def cuda_backend(device: torch.device, dtype: torch.dtype) -> Backend:
    """Returns the backend for a GPU: with kernels for half precision, plain for other dtypes."""
    half = dtype in (torch.bfloat16, torch.float16)
    return CudaBackend(device, dtype) if half else PlainCudaBackend(device, dtype)


class PlainCudaBackend(TorchBackend):
    """torch's own operations on a GPU, and the compiled sampler."""

    default_chunk_tokens = CHUNK_TOKENS
    claims_memory = True
    overlaps = True

    def sampler_slots(self, slots: int, vocab_size: int) -> SamplerSlots:
        return CudaSlots(slots=slots, vocab_size=vocab_size, device=self.device)

    def prepare_thread(self) -> None:
        torch.cuda.set_device(self.device)  # Triton launches kernels on the thread's current device

    def synchronize(self) -> None:
        torch.cuda.synchronize(self.device)

    def timestamp(self) -> Timestamp:
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def event(self) -> torch.cuda.Event | None:
        event = torch.cuda.Event()
        event.record()
        return event


class CudaFeedForward(TorchFeedForward):
    """An FF block whose activations and expert sets have kernels."""

    def activations(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        code = ACTIVATION_CODES[self.weights.activation]
        return activate_rows(self.inner(x), code, gated=self.weights.gated)

    def __call__(
        self, x: Tensor, norm: Norm | None = None, residual: Tensor | None = None
    ) -> Tensor:
        if x.shape[0] == 1:
            return self.private(x, None, norm, residual)
        return self.on_all(x, None, norm, residual)

    def private(
        self, x: Tensor, sets: ExpertRows | None, norm: Norm | None, residual: Tensor | None
    ) -> Tensor:
        """Runs each row on its own set, or all rows on all neurons, read by index."""
        if norm is not None and not _is_rms(norm):
            x, norm = self._backend.norm(x, norm), None
        return feedforward(x, self.weights, sets, norm=_fused(norm), residual=residual)

    def shared(
        self, x: Tensor, sets: ExpertRows, norm: Norm | None, residual: Tensor | None
    ) -> Tensor:
        """Runs all rows on the set of the first row."""
        if norm is not None:
            x = self._backend.norm(x, norm)
        if x.shape[0] <= MAX_SHARED_TOKENS:
            return feedforward(x, self.weights, sets, residual=residual)
        parts = x.split(MAX_SHARED_TOKENS)
        y = torch.cat([feedforward(part, self.weights, sets) for part in parts])
        return y if residual is None else y.add_(residual)

    def on_all(
        self, x: Tensor, sets: ExpertRows | None, norm: Norm | None, residual: Tensor | None
    ) -> Tensor:
        """Reads all weights once for all rows, and zeroes each row's activations outside its own
        set: the result of private sets at the cost of a dense step."""
        if norm is not None:
            x = self._backend.norm(x, norm)
        code = ACTIVATION_CODES[self.weights.activation]
        z = activate_own(self.inner(x), code, sets, gated=self.weights.gated)
        y = self.output(z, residual)
        if sets is None or sets.correction is None:
            return y
        own = sets.correction
        y = y + own.bias.index_select(0, sets.slim_ids)
        if own.rank:
            into, out = (each.index_select(0, sets.slim_ids) for each in (own.into, own.out))
            y.add_(torch.bmm(torch.bmm(x[:, None], into.mT), out)[:, 0])
        return y


class PrefillAttention(TorchAttention):
    """Attention for prompts: one kernel rotates all rows and stores their keys and values.

    Args:
        places: [N] int64, the KV slot of each row; below 0 for padding.
    """

    def __init__(
        self,
        backend: Backend,
        spec: ModelSpec,
        runs: Sequence[Run],
        ropes: Sequence[Rope],
        places: Tensor,
    ) -> None:
        super().__init__(backend, spec, runs, ropes)
        self._places = places
        self._pools = _by_pool(runs)

    def rotate_and_store(self, layer: int, qkv: Tensor, rope: Rope | None) -> None:
        """See ``TorchAttention``."""
        for layers, begin, end in self._pools:
            own = None if rope is None else (rope[0][begin:end], rope[1][begin:end])
            rotate_and_store(
                qkv[begin:end], self.spec.num_heads, own, layers[layer], self._places[begin:end]
            )

    def keys_and_values(self, layer: int, qkv: Tensor, run: Run) -> tuple[Tensor, Tensor]:
        """See ``TorchAttention``."""
        if run.start:
            return super().keys_and_values(layer, qkv, run)
        # The pool holds the same keys and values as these rows.
        own = qkv[run.begin : run.end, self.spec.num_heads :].transpose(0, 1)
        return own[: self.spec.num_kv_heads], own[self.spec.num_kv_heads :]


class DecodeAttention:
    """Attention for a step's rows over the pool, in two launches per layer."""

    def __init__(self, backend: CudaBackend, spec: ModelSpec, pool: KvPool, rows: RowTable) -> None:
        self._backend = backend
        self._spec = spec
        self._pool = pool
        self._rows = rows
        self._ropes = ropes_of(spec, rows.positions, backend.dtype)
        self._plan = split_plan(
            rows.table.shape[1], spec.num_heads, spec.num_kv_heads, spec.head_dim, backend.programs
        )

    def __call__(self, layer: int, qkv: Tensor, q_norm: Norm | None, k_norm: Norm | None) -> Tensor:
        """See ``base.Attention``."""
        spec, own, rows = self._spec, self._spec.layers[layer], self._rows
        norms = None
        if q_norm is not None and k_norm is not None:
            assert q_norm.weight is not None and k_norm.weight is not None
            norms = q_norm.weight, k_norm.weight, q_norm.eps
        return attend_rows(
            qkv,
            spec.num_heads,
            None if own.rotary is None else self._ropes[own.rotary],
            norms,
            self._pool.layers[layer],
            rows.kv_slots,
            rows.cached,
            rows.positions,
            window=own.window,
            scale=spec.query_scale,
            softcap=spec.attention_softcap,
            plan=self._plan,
        )


class CudaBackend(PlainCudaBackend):
    """See ``Backend``."""

    captures = True

    def __init__(self, device: torch.device, dtype: torch.dtype) -> None:
        super().__init__(device, dtype)
        properties = torch.cuda.get_device_properties(device)
        self.programs = PROGRAMS * properties.multi_processor_count

    def pack_ff(self, weights: FFWeights, layout: Layout = "both") -> FeedForward:
        return CudaFeedForward(self, weights, layout)

    def norm(self, x: Tensor, norm: Norm, residual: Tensor | None = None) -> Tensor:
        if _is_rms(norm) and x.is_contiguous():
            assert norm.weight is not None
            width = x.shape[-1:]
            flat = None if residual is None else residual.view(-1, *width)
            return rms_norm(x.view(-1, *width), norm.weight, norm.eps, flat).view(x.shape)
        return super().norm(x, norm, residual)

    def linear(
        self, x: Tensor, w: Linear, *, norm: Norm | None = None, residual: Tensor | None = None
    ) -> Tensor:
        assert w.weight is not None
        # The FF's down projection is a transposed view; its kernels read the neurons directly.
        if x.shape[0] > 1 or not w.weight.is_contiguous():
            return super().linear(x, w, norm=norm, residual=residual)
        if norm is not None and not _is_rms(norm):
            x, norm = self.norm(x, norm), None
        return matvec(x, w.weight, w.bias, norm=_fused(norm), residual=residual)

    def prefill_attention(
        self, spec: ModelSpec, runs: Sequence[tuple[KvCache, int]], positions: Tensor
    ) -> Attention:
        found = prefill_runs(runs)
        spans = [
            torch.arange(run.start, run.stop, device=self.device).add_(run.first_slot)
            for run in found
        ]
        places = spans[0] if len(spans) == 1 else torch.cat(spans)
        return PrefillAttention(self, spec, found, ropes_of(spec, positions, self.dtype), places)

    def padded_prefill_attention(
        self, spec: ModelSpec, pool: KvPool, positions: Tensor, places: Tensor
    ) -> Attention:
        """Returns attention for one prompt from its first token on, with padding rows after it.

        Args:
            positions: [N] int64, 0 to N - 1.
            places: [N] int64, the KV slot of each row; below 0 for padding.
        """
        rows = positions.shape[0]
        run = Run(layers=pool.layers, first_slot=0, start=0, begin=0, end=rows)
        return PrefillAttention(self, spec, [run], ropes_of(spec, positions, self.dtype), places)

    def decode_attention(self, spec: ModelSpec, pool: KvPool, rows: RowTable) -> Attention:
        if rows.most_new_tokens <= MOST_NEW_TOKENS:
            return DecodeAttention(self, spec, pool, rows)
        return PrefillAttention(
            self,
            spec,
            decode_runs(pool, rows),
            ropes_of(spec, rows.positions, self.dtype),
            rows.kv_slots + rows.positions,
        )

    def add_statistic(self, sums: Tensor, z: Tensor, squares: Tensor | None, runs: RowRuns) -> None:
        assert squares is not None
        add_sums(sums, z, squares, runs.on_device)


def _is_rms(norm: Norm) -> bool:
    return norm.kind == "rms" and norm.weight is not None


def _fused(norm: Norm | None) -> tuple[Tensor, float] | None:
    if norm is None:
        return None
    assert norm.weight is not None
    return norm.weight, norm.eps


def _by_pool(runs: Sequence[Run]) -> list[tuple[Sequence[Tensor], int, int]]:
    """Groups adjacent runs by pool. Returns (layers of the pool, first row, end row) for each
    group."""
    stretches: list[tuple[Sequence[Tensor], int, int]] = []
    for run in runs:
        if stretches and stretches[-1][0] is run.layers:
            stretches[-1] = (run.layers, stretches[-1][1], run.end)
        else:
            stretches.append((run.layers, run.begin, run.end))
    return stretches
