"""The interface of a backend: the operations of a decoder on one kind of device, in one dtype.

``Decoder`` says what a layer does, a backend says how. ``TorchBackend`` is the plain reference that
the others are tested against. A backend knows nothing about sessions or engines.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal, Protocol

import torch
from torch import Tensor

from griffin_core.backends.batch import RowRuns, RowTable
from griffin_core.kv.cache import KvCache
from griffin_core.kv.pool import KvPool
from griffin_core.spec.model import ModelSpec
from griffin_core.spec.weights import FFWeights, Norm

if TYPE_CHECKING:
    from griffin_core.sampling.params import SamplingParams

Layout = Literal["gemv", "gemm", "both"]
"""The number of rows that weights are laid out for: one (gemv), several (gemm), or either (both).
Other numbers of rows work but are slower."""

Timestamp = float | torch.cuda.Event
"""A point in time: seconds on the host's clock, or an event in a GPU's stream."""


class Linear(Protocol):
    """The weights of y = x Wᵀ + b, laid out by a backend."""

    weight: Tensor | None
    """[out, in]; None if the backend holds only a copy in another layout."""
    bias: Tensor | None
    """[out] or None."""


class RunFF(Protocol):
    """Runs the FF block of a layer: dense, dense while taking the statistic, or each row on its own
    experts."""

    def __call__(
        self, x: Tensor, norm: Norm | None = None, residual: Tensor | None = None
    ) -> Tensor:
        """Returns residual + FF(norm(x)), [N, D] -> [N, D]."""
        ...


class FeedForward(RunFF, Protocol):
    """An FF block of all or some neurons, laid out by a backend."""

    weights: FFWeights

    def activations(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """Takes x [T, D], already normalized. Returns Z [T, F], and parts [T, n] float32 whose sum
        is each row's ‖Z_t‖² if a kernel computes them along with Z, else None."""
        ...

    def gather(self, experts: Tensor, layout: Layout) -> FeedForward:
        """Returns a block that holds copies of some neurons: experts [K], ascending integers."""
        ...

    def gathered_bytes(self, k: int) -> int:
        """Returns the most bytes that a block of k neurons from ``gather`` holds."""
        ...

    def output(self, z: Tensor, residual: Tensor | None = None) -> Tensor:
        """Returns residual + Z Wᵀ_down, [T, F] -> [T, D]."""
        ...

    def zeroed(
        self, x: Tensor, keep: Tensor, norm: Norm | None = None, residual: Tensor | None = None
    ) -> Tensor:
        """Does the same as calling the block, with some activations set to zero.

        Args:
            keep: [F] bool for all rows, or [n, F] of x's dtype for the last n rows: 1 for the
                neurons that a row runs on, else 0.
        """
        ...

    def by_rows(
        self,
        x: Tensor,
        keep: Tensor | None,
        norm: Norm | None = None,
        residual: Tensor | None = None,
    ) -> Tensor:
        """Does the same as ``zeroed`` for the last n rows, or runs all neurons if ``keep`` is None,
        such that no row's activations depend on its place in the batch or on other rows."""
        ...


class Attention(Protocol):
    """The attention of one batch, made once for all layers."""

    def __call__(self, layer: int, qkv: Tensor, q_norm: Norm | None, k_norm: Norm | None) -> Tensor:
        """Normalizes and rotates queries and keys, stores keys and values, and attends.

        Args:
            qkv: [N, H + 2 · kv_heads, head_dim], contiguous. It may be overwritten.

        Returns:
            [N, H · head_dim].
        """
        ...


class SamplerSlots(Protocol):
    """The sampling state of every sampler slot on a device. See ``sampling.Sampler``."""

    drawn: Tensor

    @property
    def nbytes(self) -> int: ...

    @property
    def in_use(self) -> frozenset[int]: ...

    def open(self, slot: int, params: SamplingParams, seen: Sequence[int]) -> None: ...

    def ban(self, slot: int, tokens: Sequence[int]) -> None: ...

    def count(self, slot: int, tokens: Sequence[int], times: int) -> None: ...

    def close(self, slot: int) -> None: ...

    def sample(self, logits: Tensor, slots: Tensor, positions: Tensor) -> Tensor: ...


class Backend(ABC):
    """The operations of a decoder. Floating-point tensors have ``dtype`` unless stated otherwise.

    Args:
        device: where weights and activations are.
        dtype: the type of weights and activations.
    """

    def __init__(self, device: torch.device, dtype: torch.dtype) -> None:
        self.device = device
        self.dtype = dtype

    def prepare(self, spec: ModelSpec) -> None:  # noqa: B027  # most backends have nothing to do
        """Compiles the slow parts in advance, so that no request waits for them."""

    # -- weights ---------------------------------------------------------------------------------

    @abstractmethod
    def pack_linear(
        self, weight: Tensor, bias: Tensor | None = None, layout: Layout = "both"
    ) -> Linear:
        """Lays out the weights of a matrix product.

        Args:
            weight: [out, in].
            bias: [out] or None.
        """

    @abstractmethod
    def pack_ff(self, weights: FFWeights, layout: Layout = "both") -> FeedForward:
        """Lays out an FF block: all neurons of a layer, or copies of some."""

    @abstractmethod
    def linear_bytes(self, rows: int, columns: int) -> int:
        """Returns the most bytes that ``pack_linear`` holds for a weight [rows, columns] in one
        layout."""

    # -- operations ------------------------------------------------------------------------------

    @abstractmethod
    def norm(self, x: Tensor, norm: Norm, residual: Tensor | None = None) -> Tensor:
        """Returns residual + norm(x) over the last dimension, [..., D], computed in float32."""

    @abstractmethod
    def linear(
        self, x: Tensor, w: Linear, *, norm: Norm | None = None, residual: Tensor | None = None
    ) -> Tensor:
        """Returns residual + w(norm(x)), [N, in] -> [N, out]."""

    @abstractmethod
    def softcap(self, logits: Tensor, cap: float) -> Tensor:
        """Returns cap · tanh(logits / cap), [N, V] float32."""

    @abstractmethod
    def prefill_attention(
        self, spec: ModelSpec, runs: Sequence[tuple[KvCache, int]], positions: Tensor
    ) -> Attention:
        """Returns causal attention for long runs of new tokens, each over its own cache and itself.

        Args:
            runs: each sequence's cache, and the number of rows of the batch that are its next
                tokens.
            positions: [N] int64, the position of each row in its sequence.
        """

    @abstractmethod
    def decode_attention(self, spec: ModelSpec, pool: KvPool, rows: RowTable) -> Attention:
        """Returns causal attention for a few new tokens in each of many sequences of one pool."""

    @abstractmethod
    def add_statistic(self, sums: Tensor, z: Tensor, squares: Tensor | None, runs: RowRuns) -> None:
        """Adds Σ_t Z_tf² / ‖Z_t‖², Σ_t Z_tf² and Σ_t Z_tf over each of R runs of rows to sums [R,
        3, F] float32, in place.

        A zero row, which ReLU can produce, adds nothing; a row whose squares underflow adds nothing
        to the first sum.

        Args:
            sums: [R, 3, F]; its rows need not be adjacent in memory.
            z: [N, F].
            squares: the second result of ``FeedForward.activations``.
        """

    def new_pool(self, spec: ModelSpec, tokens: int) -> KvPool:
        """Allocates a pool for the keys and values of ``tokens`` tokens."""
        shape = (2, spec.num_kv_heads, tokens + 1, spec.head_dim)
        return KvPool(
            [torch.empty(shape, dtype=self.dtype, device=self.device) for _ in spec.layers]
        )

    @abstractmethod
    def sampler_slots(self, slots: int, vocab_size: int) -> SamplerSlots:
        """Allocates the sampling state of ``slots`` sessions and one padding slot."""

    # -- the device ------------------------------------------------------------------------------

    default_chunk_tokens = 512
    """Prompt tokens in a pass: enough for matrix products to reach the device's full rate, and no
    more, since running streams wait for the pass."""

    claims_memory = False
    """Whether the memory for sessions is claimed at start. On a CPU it is not: pages are taken as
    they are filled."""

    overlaps = False
    """Whether the device runs a step while the host does other work."""

    captures = False
    """Whether all operations can be captured as a graph (``capture``)."""

    def prepare_thread(self) -> None:  # noqa: B027
        """Prepares the calling thread. Call it once on the thread that runs the model."""

    def synchronize(self) -> None:  # noqa: B027
        """Waits until the device has finished all work submitted so far. Raises if the GPU is
        lost."""

    def timestamp(self) -> Timestamp:
        """Returns the time now; on a GPU, an event after all work submitted so far, without
        waiting."""
        return time.perf_counter()

    def event(self) -> torch.cuda.Event | None:
        """Returns an event after all work submitted so far on a GPU; None where work is
        synchronous."""
        return None
