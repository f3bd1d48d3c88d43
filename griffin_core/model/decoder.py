"""The decoder: one definition for prefill and decode, all families, dense or on experts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from griffin_core.backends.cpu.attention import CacheTable, attend_kernel, attend_rows, cache_table
from griffin_core.backends.cpu.norm import MAX_VALUES, rms_norm
from griffin_core.backends.cpu.team import compile_kernels, runs_kernels
from griffin_core.backends.cuda import on_device, runs_cuda_kernels
from griffin_core.kv.cache import KvCache
from griffin_core.model.attention import (
    Rotation,
    Visible,
    attend,
    rotate,
    rotation,
    visible_tokens,
)
from griffin_core.model.feedforward import FeedForward, Neurons
from griffin_core.model.linear import Linear
from griffin_core.spec.model import ModelSpec

if TYPE_CHECKING:  # it needs triton
    from griffin_core.backends.cuda.rotary import Places

RunFF = Callable[[Tensor], Tensor]
"""[N, D] -> [N, D]: what a layer runs as its FF block: the dense one, one that also takes the
statistic, or slim views of several sessions, each on its rows."""


@dataclass(frozen=True, kw_only=True)
class Norm:
    """RMSNorm (no bias) or LayerNorm over the last dimension, in float32.

    Args:
        weight: float32, any offset of the family already added; None for all ones.
    """

    kind: str
    eps: float
    weight: Tensor | None
    bias: Tensor | None = None

    def __call__(self, x: Tensor) -> Tensor:
        shape = x.shape[-1:]
        if self.kind == "rms" and self.weight is not None and x.is_contiguous():
            if runs_kernels(x.dtype, x.device) and x.numel() <= MAX_VALUES:
                return rms_norm(x, self.weight, self.eps)
            if runs_cuda_kernels(x.dtype, x.device):
                from griffin_core.backends.cuda import matvec  # noqa: PLC0415  # needs triton

                return matvec.rms_norm(x.view(-1, *shape), self.weight, self.eps).view(x.shape)
        if self.kind == "rms":
            return F.rms_norm(x.float(), shape, self.weight, self.eps).to(x.dtype)
        return F.layer_norm(x.float(), shape, self.weight, self.bias, self.eps).to(x.dtype)


@dataclass(frozen=True, kw_only=True)
class Layer:
    """Weights of one decoder layer. The optional norms are there if the family has them.

    Args:
        qkv: to queries, keys and values, one below the other.
        neurons: the FF's weights by neuron, for those who take some of them.
        ff: the FF on all of them.
    """

    qkv: Linear
    o: Linear
    neurons: Neurons
    ff: FeedForward
    attention_norm: Norm
    ff_norm: Norm
    q_norm: Norm | None = None
    k_norm: Norm | None = None
    attention_out_norm: Norm | None = None
    ff_out_norm: Norm | None = None


@dataclass(frozen=True, kw_only=True)
class DecoderWeights:
    """Everything that is loaded.

    Args:
        embedding: [V, embed width].
        head: to V logits; of the embedding itself where the model ties them.
        positions: learned position table, or None.
        project_in, project_out: between embedding width and D (OPT-350m), or None.
    """

    embedding: Tensor
    layers: tuple[Layer, ...]
    final_norm: Norm | None
    head: Linear
    positions: Tensor | None = None
    project_in: Tensor | None = None
    project_out: Tensor | None = None


@dataclass(frozen=True, kw_only=True)
class TokenRun:
    """Consecutive tokens of one sequence.

    Args:
        cache: of the sequence; holds everything before them, gets their keys and values. None if
            there is nothing before them and ``Batch.places`` says where these go.
        start: position of the first.
        first_row: where they begin in the batch.
        tokens: how many they are.
        visible: what they see, by the layer's window.
    """

    cache: KvCache | None
    start: int
    first_row: int
    tokens: int
    visible: dict[int | None, Visible]


@dataclass(frozen=True, kw_only=True)
class Batch:
    """Tokens of one or more sequences on their way through the layers: what all layers share.

    Args:
        rotations: of each kind of rotary positions, as in ``ModelSpec.rotaries``.
        table: of the caches, if each run is one token and a kernel attends for all of them.
        places: on a GPU, where a kernel puts keys and values.
    """

    runs: tuple[TokenRun, ...]
    rotations: tuple[Rotation, ...]
    table: CacheTable | None
    places: Places | None = None


class Decoder:
    """A model ready to run. Holds weights and no state of any request.

    Args:
        spec: its shape.
        weights: of one dtype, on one device.
    """

    def __init__(self, spec: ModelSpec, weights: DecoderWeights) -> None:
        self.spec = spec
        self.layers = weights.layers
        self._weights = weights
        self._windows = {s.window for s in spec.layers}
        self._runs_kernels = runs_kernels(self.dtype, self.device)
        if self._runs_kernels:
            attend_kernel(spec.head_dim, spec.heads // spec.kv_heads)
            compile_kernels()

    @property
    def dtype(self) -> torch.dtype:
        return self._weights.embedding.dtype

    @property
    def device(self) -> torch.device:
        return self._weights.embedding.device

    def new_cache(self, capacity: int) -> KvCache:
        """An empty cache for that many tokens."""
        return KvCache(self.spec, capacity, dtype=self.dtype, device=self.device)

    def magnitudes(self) -> Tensor:
        """Static strength of every neuron, [L, F] float32; see ``Neurons.magnitude``."""
        return torch.stack([layer.neurons.magnitude() for layer in self.layers])

    def embed(self, token_ids: Tensor, positions: Tensor) -> Tensor:
        """Tokens [N] int64 at positions [N] -> what the first layer reads [N, D]."""
        w = self._weights
        x = F.embedding(token_ids, w.embedding)
        if self.spec.embed_scale != 1.0:
            x = x * torch.tensor(self.spec.embed_scale, dtype=x.dtype)
        if w.project_in is not None:
            x = F.linear(x, w.project_in)
        return x if w.positions is None else x + w.positions[positions + self.spec.position_offset]

    def begin(self, token_ids: Tensor, runs: Sequence[tuple[KvCache, int]]) -> tuple[Tensor, Batch]:
        """Embeds tokens of several sequences, one sequence behind the other.

        Args:
            token_ids: [N] int64.
            runs: each sequence's cache, and how many of the tokens are its own; they stand behind
                what the cache holds.

        Returns:
            Embeddings [N, D], and what the layers share.
        """
        batch_runs: list[TokenRun] = []
        row = 0
        for cache, tokens in runs:
            start = cache.length
            visible = {n: visible_tokens(start, tokens, n, self.device) for n in self._windows}
            batch_runs.append(
                TokenRun(cache=cache, start=start, first_row=row, tokens=tokens, visible=visible)
            )
            row += tokens
        positions = self._positions(batch_runs)
        x = self.embed(token_ids, positions)
        rotations = tuple(rotation(r, positions, self.dtype) for r in self.spec.rotaries)
        table = None
        if self._runs_kernels and all(tokens == 1 for _, tokens in runs):
            table = cache_table([(c.addresses, c.length, c.capacity) for c, _ in runs])
        places = None
        if runs_cuda_kernels(self.dtype, self.device):
            places = self._places(runs)
        return x, Batch(runs=tuple(batch_runs), rotations=rotations, table=table, places=places)

    def _places(self, runs: Sequence[tuple[KvCache, int]]) -> Places:
        """On the device, in one copy that the host does not wait for."""
        from griffin_core.backends.cuda.rotary import Places  # noqa: PLC0415  # needs triton

        caches = [cache for cache, _ in runs]
        ends = [0]
        for cache, tokens in runs:
            end = cache.length + tokens
            if end > cache.capacity:
                raise ValueError(
                    f"tokens {cache.length}..{end} do not fit a cache of {cache.capacity}"
                )
            ends.append(ends[-1] + tokens)
        count, layers = len(runs), len(self.layers)
        numbers = [cache.capacity for cache in caches] + [cache.length for cache in caches] + ends
        for layer in range(layers):
            numbers += [cache.addresses[layer] for cache in caches]
        there = on_device(numbers, torch.int64, self.device)
        capacities, starts, bounds, addresses = torch.split_with_sizes(
            there, [count, count, count + 1, layers * count]
        )
        return Places(
            addresses=addresses.view(layers, count),
            capacities=capacities,
            starts=starts,
            bounds=bounds,
        )

    def _positions(self, runs: Sequence[TokenRun]) -> Tensor:
        """Of all tokens, [N] int64, made where they are needed: a list of thousands takes the host
        longer than a GPU takes a layer."""
        spans = [
            torch.arange(run.start, run.start + run.tokens, device=self.device) for run in runs
        ]
        return spans[0] if len(spans) == 1 else torch.cat(spans)

    def layer(self, index: int, x: Tensor, batch: Batch, ff: RunFF) -> Tensor:
        """x [N, D] through layer ``index``; writes its keys and values into the caches."""
        w = self.layers[index]
        before = self.spec.norm_before
        attention = self._attention(index, w.attention_norm(x) if before else x, batch)
        if w.attention_out_norm is not None:
            attention = w.attention_out_norm(attention)
        x = x + attention
        if not before:
            x = w.attention_norm(x)
        out = ff(w.ff_norm(x) if before else x)
        if w.ff_out_norm is not None:
            out = w.ff_out_norm(out)
        x = x + out
        return x if before else w.ff_norm(x)

    def _attention(self, index: int, x: Tensor, batch: Batch) -> Tensor:
        w, spec, layer = self.layers[index], self.spec, self.spec.layers[index]
        heads, kv_heads = spec.heads, spec.kv_heads
        qkv = w.qkv(x).view(x.shape[0], heads + 2 * kv_heads, spec.head_dim)
        q, k, qk = qkv[:, :heads], qkv[:, heads : heads + kv_heads], qkv[:, : heads + kv_heads]
        if w.q_norm is not None and w.k_norm is not None:
            q.copy_(w.q_norm(q))
            k.copy_(w.k_norm(k))
        rotation = None if layer.rotary is None else batch.rotations[layer.rotary]
        if batch.table is not None:
            return w.o(
                attend_rows(
                    qkv,
                    heads,
                    rotation,
                    batch.table,
                    index,
                    window=layer.window,
                    scale=spec.query_scale,
                    softcap=spec.attention_softcap,
                )
            )
        if batch.places is not None:
            from griffin_core.backends.cuda.rotary import rotate_and_store  # noqa: PLC0415  # needs triton

            rotate_and_store(qkv, heads, rotation, batch.places, index)
        elif rotation is not None:
            rotate(qk, rotation)
        # The one loop over sequences: each has its own length, and torch's CPU has no attention
        # that takes many lengths without padding them to the longest.
        out = []
        for run in batch.runs:
            rows = slice(run.first_row, run.first_row + run.tokens)
            visible = run.visible[layer.window]
            if batch.places is None:
                assert run.cache is not None
                keys, values = run.cache.write(index, run.start, qkv[rows, heads:])
            elif run.start == 0:  # the cache holds what stands in these rows
                own = qkv[rows, heads:].transpose(0, 1)
                keys, values = own[:kv_heads], own[kv_heads:]
            else:
                assert run.cache is not None
                keys, values = run.cache.room(index, 0, run.start + run.tokens).unbind()
            out.append(
                attend(q[rows], keys, values, visible, spec.query_scale, spec.attention_softcap)
            )
        return w.o(out[0] if len(out) == 1 else torch.cat(out))

    @property
    def final_norm(self) -> Norm | None:
        """Between the last layer and the head."""
        return self._weights.final_norm

    def final_hidden(self, x: Tensor) -> Tensor:
        """Output of the last layer [N, D] -> what the head reads [N, D]."""
        return x if self.final_norm is None else self.final_norm(x)

    def head(
        self, hidden: Tensor, project: Callable[[Tensor, Linear], Tensor] | None = None
    ) -> Tensor:
        """Final hidden state [N, D] -> logits [N, V] float32.

        Args:
            project: how to multiply, if not as the head does itself.
        """
        w = self._weights
        if w.project_out is not None:
            hidden = F.linear(hidden, w.project_out)
        logits = (w.head(hidden) if project is None else project(hidden, w.head)).float()
        cap = self.spec.logit_softcap
        if cap is None:
            return logits
        if logits.device.type == "cpu":  # row by row; see ``FeedForward.apart``
            return torch.stack([cap * torch.tanh(row / cap) for row in logits.unbind()])
        return cap * torch.tanh(logits / cap)
