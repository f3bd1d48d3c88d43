"""The decoder: the one forward pass, for prompts and decode steps, all families, dense or on
experts.

It defines what a layer computes; a backend defines how.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from griffin_core.backends.base import Attention, Backend, RunFF
from griffin_core.kv.cache import KvCache
from griffin_core.kv.pool import KvPool
from griffin_core.model.weights import DecoderWeights
from griffin_core.spec.calibration import Calibration
from griffin_core.spec.model import ModelSpec
from griffin_core.spec.weights import Norm


class Decoder:
    """A model that is ready to run. It holds weights, and no state of any request.

    Args:
        spec: the shape of the model.
        weights: its weights, laid out by the backend.
    """

    def __init__(self, spec: ModelSpec, weights: DecoderWeights, backend: Backend) -> None:
        self.spec = spec
        self.layers = weights.layers
        self.backend = backend
        self.calibration: Calibration | None = None
        """What ``griffin calibrate`` measured; set by what loads the model. On the device."""
        self._weights = weights
        backend.prepare(spec)

    @property
    def dtype(self) -> torch.dtype:
        return self._weights.embedding.dtype

    @property
    def device(self) -> torch.device:
        return self._weights.embedding.device

    @property
    def calibration_digest(self) -> str:
        """The digest of its calibration; empty if it has none."""
        return "" if self.calibration is None else self.calibration.digest

    def new_pool(self, tokens: int) -> KvPool:
        """Allocates a KV pool for ``tokens`` tokens, shared by any number of sequences."""
        return self.backend.new_pool(self.spec, tokens)

    def new_cache(self, capacity: int) -> KvCache:
        """Allocates an empty cache for ``capacity`` tokens in a pool of its own."""
        return self.new_pool(capacity).allocate(capacity)

    def magnitudes(self) -> Tensor:
        """Returns the static strength of every neuron, [L, F] float32; see
        ``FFWeights.magnitude``."""
        return torch.stack([layer.ff.weights.magnitude() for layer in self.layers])

    def embed(self, token_ids: Tensor, positions: Tensor) -> Tensor:
        """Embeds tokens [N] int64 at positions [N] -> the input of the first layer [N, D]."""
        w = self._weights
        x = F.embedding(token_ids, w.embedding)
        if self.spec.embed_scale != 1.0:
            x = x * torch.tensor(self.spec.embed_scale, dtype=x.dtype)
        if w.project_in is not None:
            x = F.linear(x, w.project_in)
        return x if w.positions is None else x + w.positions[positions + self.spec.position_offset]

    def prepare_batch(
        self, token_ids: Tensor, runs: Sequence[tuple[KvCache, int]]
    ) -> tuple[Tensor, Attention]:
        """Embeds new tokens of several sequences, one sequence after the other.

        Args:
            token_ids: [N] int64.
            runs: each sequence's cache, and the number of the tokens that are its next ones.

        Returns:
            Embeddings [N, D], and the attention for all layers.
        """
        # Made on the device: building a list of thousands on the host takes longer than a layer on
        # a GPU.
        spans = [
            torch.arange(cache.length, cache.length + tokens, device=self.device)
            for cache, tokens in runs
        ]
        positions = spans[0] if len(spans) == 1 else torch.cat(spans)
        attention = self.backend.prefill_attention(self.spec, runs, positions)
        return self.embed(token_ids, positions), attention

    def forward(self, x: Tensor, attention: Attention, ff: Callable[[int], RunFF]) -> Tensor:
        """Runs x [N, D] through all layers.

        Args:
            ff: returns a layer's FF block by its index.
        """
        for index in range(len(self.layers)):
            x = self.layer(index, x, attention, ff(index))
        return x

    def layer(self, index: int, x: Tensor, attention: Attention, ff: RunFF) -> Tensor:
        """Runs x [N, D] through layer ``index``, and stores its keys and values."""
        w, spec, run = self.layers[index], self.spec, self.backend
        before = spec.norm_before
        qkv = run.linear(x, w.qkv, norm=w.attention_norm if before else None)
        heads = qkv.view(x.shape[0], spec.num_heads + 2 * spec.num_kv_heads, spec.head_dim)
        attended = attention(index, heads, w.q_norm, w.k_norm)
        if w.attention_out_norm is None:
            x = run.linear(attended, w.o, residual=x)
        else:
            x = run.norm(run.linear(attended, w.o), w.attention_out_norm, residual=x)
        if not before:
            x = run.norm(x, w.attention_norm)
        ff_norm = w.ff_norm if before else None
        if w.ff_out_norm is None:
            x = ff(x, ff_norm, x)
        else:
            x = run.norm(ff(x, ff_norm), w.ff_out_norm, residual=x)
        return x if before else run.norm(x, w.ff_norm)

    def dense(self, index: int) -> RunFF:
        """Returns the FF block of a layer on all neurons."""
        return self.layers[index].ff

    def final_hidden(self, x: Tensor) -> Tensor:
        """Turns the output of the last layer [N, D] into the input of the head [N, D]."""
        norm = self._weights.final_norm
        return x if norm is None else self.backend.norm(x, norm)

    def head(self, hidden: Tensor, norm: Norm | None = None) -> Tensor:
        """Turns hidden states [N, D] into logits [N, V] float32.

        Args:
            norm: the norm to apply first; None if ``final_hidden`` has applied it.
        """
        w = self._weights
        if w.project_out is not None:
            hidden = hidden if norm is None else self.backend.norm(hidden, norm)
            hidden, norm = F.linear(hidden, w.project_out), None
        logits = self.backend.linear(hidden, w.head, norm=norm).float()
        cap = self.spec.logit_softcap
        return logits if cap is None else self.backend.softcap(logits, cap)

    def logits(self, x: Tensor) -> Tensor:
        """Turns the output of the last layer [N, D] into logits [N, V] float32."""
        return self.head(x, self._weights.final_norm)
