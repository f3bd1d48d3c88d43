"""The plain backend: torch's own operations, on any device and in any dtype."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from griffin_core.backends.activations import ACTIVATIONS
from griffin_core.backends.attention import (
    AttentionMask,
    Rope,
    apply_rope,
    attend,
    attention_mask,
    ropes_of,
)
from griffin_core.backends.base import (
    Attention,
    Backend,
    FeedForward,
    Layout,
    Linear,
    SamplerSlots,
)
from griffin_core.backends.batch import RowRuns, RowTable
from griffin_core.backends.statistic import statistic
from griffin_core.backends.torch_sampling import TorchSlots
from griffin_core.kv.cache import KvCache
from griffin_core.kv.pool import KvPool
from griffin_core.spec.model import ModelSpec
from griffin_core.spec.weights import FFWeights, Norm


class TorchLinear:
    """The weights of a matrix product, as they are loaded."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        self.weight: Tensor | None = weight
        self.bias = bias


class TorchFeedForward:
    """An FF block of two matrix products.

    Args:
        backend: runs the products.
        weights: all neurons of a layer, or copies of some.
    """

    def __init__(self, backend: Backend, weights: FFWeights, layout: Layout) -> None:
        self.weights = weights
        self._backend = backend
        self._activation = ACTIVATIONS[weights.activation]
        self._in = backend.pack_linear(weights.w_in.flatten(0, 1), weights.up_bias, layout)
        self._out = backend.pack_linear(weights.down.t(), weights.down_bias, layout)

    def gather(self, experts: Tensor, layout: Layout) -> FeedForward:
        """See ``base.FeedForward``."""
        return self._backend.pack_ff(self.weights.gather(experts), layout)

    def gathered_bytes(self, k: int) -> int:
        """See ``base.FeedForward``."""
        w, width = self.weights, self.weights.down.shape[1]
        biases = (0 if w.up_bias is None else k) + (0 if w.down_bias is None else width)
        return (
            self._backend.linear_bytes(w.w_in.shape[0] * k, width)
            + self._backend.linear_bytes(width, k)
            + biases * w.down.element_size()
        )

    def inner(self, x: Tensor) -> Tensor:
        """Returns the input of the activation: [T, D] -> [T, 2F], gate then up, or [T, F] for a
        plain FF."""
        return self._backend.linear(x, self._in)

    def activate(self, h: Tensor) -> Tensor:
        """Turns the result of ``inner`` into Z [T, F]."""
        if not self.weights.gated:
            return self._activation(h)
        gate, up = h.chunk(2, dim=-1)
        return self._activation(gate).mul_(up)

    def activations(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """See ``base.FeedForward``."""
        return self.activate(self.inner(x)), None

    def by_rows(
        self,
        x: Tensor,
        keep: Tensor | None,
        norm: Norm | None = None,
        residual: Tensor | None = None,
    ) -> Tensor:
        """Does the same as ``zeroed``, or runs all neurons if ``keep`` is None, and activates each
        row by itself. The SIMD body and the scalar tail of a tensor round differently, so otherwise
        a row's activations would depend on its place in the batch."""
        if norm is not None:
            x = self._backend.norm(x, norm)
        z = torch.stack([self.activate(row) for row in self.inner(x).unbind()])
        if keep is not None:
            z[z.shape[0] - keep.shape[0] :] *= keep
        return self.output(z, residual)

    def output(self, z: Tensor, residual: Tensor | None = None) -> Tensor:
        """See ``base.FeedForward``."""
        return self._backend.linear(z, self._out, residual=residual)

    def __call__(
        self, x: Tensor, norm: Norm | None = None, residual: Tensor | None = None
    ) -> Tensor:
        if norm is not None:
            x = self._backend.norm(x, norm)
        return self.output(self.activations(x)[0], residual)

    def zeroed(
        self, x: Tensor, keep: Tensor, norm: Norm | None = None, residual: Tensor | None = None
    ) -> Tensor:
        """See ``base.FeedForward``."""
        if norm is not None:
            x = self._backend.norm(x, norm)
        z = self.activations(x)[0]
        if keep.ndim == 1:
            z.mul_(keep)
        else:
            z[z.shape[0] - keep.shape[0] :] *= keep
        return self.output(z, residual)


@dataclass(frozen=True, kw_only=True)
class Run:
    """Consecutive new tokens of one sequence.

    Args:
        layers: the pool's L tensors [2, kv_heads, slots, head_dim].
        first_slot: KV slot of the sequence's first token.
        start: position of the first new token.
        begin, end: the rows of the batch that hold these tokens.
    """

    layers: Sequence[Tensor]
    first_slot: int
    start: int
    begin: int
    end: int

    @property
    def stop(self) -> int:
        """The position after the last new token."""
        return self.start + self.end - self.begin

    def kv(self, layer: int, start: int, stop: int) -> Tensor:
        """A view [2, kv_heads, stop - start, head_dim] of the sequence's keys and values."""
        return self.layers[layer][:, :, self.first_slot + start : self.first_slot + stop]


class TorchAttention:
    """Attention of each run over its own length, one run after the other: torch's attention over
    several lengths pads them all to the longest.

    Args:
        ropes: the factors for the batch's positions, a pair for each of ``spec.rotaries``.
    """

    def __init__(
        self, backend: Backend, spec: ModelSpec, runs: Sequence[Run], ropes: Sequence[Rope]
    ) -> None:
        self.spec = spec
        self.runs = runs
        self._backend = backend
        self._ropes = ropes
        windows = {layer.window for layer in spec.layers}
        self._masks: list[dict[int | None, AttentionMask]] = [
            {w: attention_mask(run.start, run.end - run.begin, w, backend.device) for w in windows}
            for run in runs
        ]

    def __call__(self, layer: int, qkv: Tensor, q_norm: Norm | None, k_norm: Norm | None) -> Tensor:
        """See ``base.Attention``."""
        spec, own = self.spec, self.spec.layers[layer]
        heads, kv_heads = spec.num_heads, spec.num_kv_heads
        if q_norm is not None and k_norm is not None:
            q, k = qkv[:, :heads], qkv[:, heads : heads + kv_heads]
            q.copy_(self._backend.norm(q, q_norm))
            k.copy_(self._backend.norm(k, k_norm))
        self.rotate_and_store(layer, qkv, None if own.rotary is None else self._ropes[own.rotary])
        out = []
        for run, masks in zip(self.runs, self._masks, strict=True):
            q = qkv[run.begin : run.end, :heads]
            keys, values = self.keys_and_values(layer, qkv, run)
            mask = masks[own.window]
            out.append(attend(q, keys, values, mask, spec.query_scale, spec.attention_softcap))
        return out[0] if len(out) == 1 else torch.cat(out)

    def rotate_and_store(self, layer: int, qkv: Tensor, rope: Rope | None) -> None:
        """Rotates queries and keys in place, and stores keys and values of all runs."""
        spec = self.spec
        if rope is not None:
            apply_rope(qkv[:, : spec.num_heads + spec.num_kv_heads], rope)
        for run in self.runs:
            kv = qkv[run.begin : run.end, spec.num_heads :]
            own = kv.view(run.end - run.begin, 2, spec.num_kv_heads, spec.head_dim)
            run.kv(layer, run.start, run.stop).copy_(own.permute(1, 2, 0, 3))

    def keys_and_values(self, layer: int, qkv: Tensor, run: Run) -> tuple[Tensor, Tensor]:
        """Returns the keys and the values that a run sees, each [kv_heads, S, head_dim]."""
        keys, values = run.kv(layer, 0, run.stop).unbind()
        return keys, values


class TorchBackend(Backend):
    """See ``Backend``."""

    def pack_linear(
        self, weight: Tensor, bias: Tensor | None = None, layout: Layout = "both"
    ) -> Linear:
        return TorchLinear(weight, bias)

    def pack_ff(self, weights: FFWeights, layout: Layout = "both") -> FeedForward:
        return TorchFeedForward(self, weights, layout)

    def linear_bytes(self, rows: int, columns: int) -> int:
        return rows * columns * self.dtype.itemsize

    def norm(self, x: Tensor, norm: Norm, residual: Tensor | None = None) -> Tensor:
        shape = x.shape[-1:]
        if norm.kind == "rms":
            y = F.rms_norm(x.float(), shape, norm.weight, norm.eps)
        else:
            y = F.layer_norm(x.float(), shape, norm.weight, norm.bias, norm.eps)
        return y.to(x.dtype) if residual is None else residual + y.to(x.dtype)

    def linear(
        self, x: Tensor, w: Linear, *, norm: Norm | None = None, residual: Tensor | None = None
    ) -> Tensor:
        if norm is not None:
            x = self.norm(x, norm)
        y = self.multiply(x, w)
        return y if residual is None else y.add_(residual)

    def multiply(self, x: Tensor, w: Linear) -> Tensor:
        """Returns w(x)."""
        assert w.weight is not None
        return F.linear(x, w.weight, w.bias)

    def softcap(self, logits: Tensor, cap: float) -> Tensor:
        return cap * torch.tanh(logits / cap)

    def prefill_attention(
        self, spec: ModelSpec, runs: Sequence[tuple[KvCache, int]], positions: Tensor
    ) -> Attention:
        return TorchAttention(self, spec, prefill_runs(runs), ropes_of(spec, positions, self.dtype))

    def decode_attention(self, spec: ModelSpec, pool: KvPool, rows: RowTable) -> Attention:
        return TorchAttention(
            self, spec, decode_runs(pool, rows), ropes_of(spec, rows.positions, self.dtype)
        )

    def add_statistic(self, sums: Tensor, z: Tensor, squares: Tensor | None, runs: RowRuns) -> None:
        for run, (begin, end) in enumerate(pairwise(runs.bounds)):
            sums[run] += self.statistic(z[begin:end])

    def statistic(self, z: Tensor) -> Tensor:
        """See ``statistic.statistic``."""
        return statistic(z)

    def sampler_slots(self, slots: int, vocab_size: int) -> SamplerSlots:
        return TorchSlots(slots, self.device)


def prefill_runs(runs: Sequence[tuple[KvCache, int]]) -> list[Run]:
    """Returns a run for each cache: its next tokens, which follow those of the cache before it in
    the batch.

    Raises:
        ValueError: the tokens do not fit a cache.
    """
    found, begin = [], 0
    for cache, tokens in runs:
        end = cache.length + tokens
        if end > cache.capacity:
            raise ValueError(f"tokens {cache.length}..{end} do not fit a cache of {cache.capacity}")
        found.append(
            Run(
                layers=cache.pool.layers,
                first_slot=cache.first_slot,
                start=cache.length,
                begin=begin,
                end=begin + tokens,
            )
        )
        begin += tokens
    return found


def decode_runs(pool: KvPool, rows: RowTable) -> list[Run]:
    """Returns the runs of a step's sequences."""
    assert rows.batch is not None, "a captured step has no runs"
    found, begin = [], 0
    for each in rows.batch.sequences:
        end = begin + len(each.token_ids)
        found.append(
            Run(
                layers=pool.layers,
                first_slot=each.first_slot,
                start=each.cached,
                begin=begin,
                end=end,
            )
        )
        begin = end
    return found
