"""What a backend offers: the operations of a decoder on one kind of device, in one dtype.

``Decoder`` says what a layer does, a backend says how. ``TorchBackend`` is the plain reference of
the others. A backend knows nothing of sessions or engines.
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
"""For how many rows at once weights are laid out: one, several, or either. Other numbers of rows
work but are slower."""

Moment = float | torch.cuda.Event
"""Seconds on the host's clock, or a place in the order of a GPU's work."""


class Linear(Protocol):
    """y = x Wᵀ + b, with weights that a backend has laid out."""

    weight: Tensor | None
    """[out, in]; None where only a copy in another layout is held."""
    bias: Tensor | None
    """[out] or None."""


class RunFF(Protocol):
    """What a layer runs as its FF block: the dense one, one that also takes the statistic, or each
    row on its own experts."""

    def __call__(
        self, x: Tensor, norm: Norm | None = None, residual: Tensor | None = None
    ) -> Tensor:
        """residual + FF(norm(x)), [N, D] -> [N, D]."""
        ...


class FeedForward(RunFF, Protocol):
    """An FF block on some neurons, laid out by a backend."""

    weights: FFWeights

    def activations(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """x [T, D], already normalized -> Z [T, F], and parts [T, n] float32 that sum to each row's
        ‖Z_t‖², where a kernel gives them with Z; else None."""
        ...

    def gather(self, experts: Tensor, layout: Layout) -> FeedForward:
        """A block that holds copies of some neurons: experts [K], ascending integers."""
        ...

    def gathered_bytes(self, k: int) -> int:
        """The most bytes that ``gather`` of k neurons holds."""
        ...

    def output(self, z: Tensor, residual: Tensor | None = None) -> Tensor:
        """residual + Z Wᵀ_down: [T, F] -> [T, D]."""
        ...

    def zeroed(
        self, x: Tensor, keep: Tensor, norm: Norm | None = None, residual: Tensor | None = None
    ) -> Tensor:
        """As a call, with some activations set to zero.

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
        """As ``zeroed`` for the last n rows, or on all neurons if ``keep`` is None, in such a way
        that no row's activations depend on its place or on other rows."""
        ...


class Attention(Protocol):
    """Attention of one batch, made once for all of its layers."""

    def __call__(self, layer: int, qkv: Tensor, q_norm: Norm | None, k_norm: Norm | None) -> Tensor:
        """Normalizes and rotates queries and keys, stores keys and values, and attends.

        Args:
            qkv: [N, H + 2 · kv_heads, head_dim], contiguous. It may be overwritten.

        Returns:
            [N, H · head_dim].
        """
        ...


class SamplerSlots(Protocol):
    """What a device keeps for each sampler slot, and draws with. See ``sampling.Sampler``."""

    drawn: Tensor

    @property
    def nbytes(self) -> int: ...

    @property
    def in_use(self) -> frozenset[int]: ...

    def open(self, slot: int, params: SamplingParams, seen: Sequence[int]) -> None: ...

    def ban(self, slot: int, tokens: Sequence[int]) -> None: ...

    def close(self, slot: int) -> None: ...

    def sample(self, logits: Tensor, slots: Tensor, positions: Tensor) -> Tensor: ...


class Backend(ABC):
    """Operations of a decoder. All floating tensors have ``dtype`` unless said otherwise.

    Args:
        device, dtype: of weights and activations.
    """

    def __init__(self, device: torch.device, dtype: torch.dtype) -> None:
        self.device = device
        self.dtype = dtype

    def prepare(self, spec: ModelSpec) -> None:  # noqa: B027  # most have nothing to do
        """Compiles what takes its time, so that no request waits for it."""

    # -- weights ---------------------------------------------------------------------------------

    @abstractmethod
    def pack_linear(
        self, weight: Tensor, bias: Tensor | None = None, layout: Layout = "both"
    ) -> Linear:
        """Lays out the weights of a product.

        Args:
            weight: [out, in].
            bias: [out] or None.
        """

    @abstractmethod
    def pack_ff(self, weights: FFWeights, layout: Layout = "both") -> FeedForward:
        """Lays out an FF block, of all neurons of a layer or of a copy of some."""

    @abstractmethod
    def linear_bytes(self, rows: int, columns: int) -> int:
        """The most bytes that ``pack_linear`` holds of a weight [rows, columns], in one layout."""

    # -- operations ------------------------------------------------------------------------------

    @abstractmethod
    def norm(self, x: Tensor, norm: Norm, residual: Tensor | None = None) -> Tensor:
        """residual + norm(x) over the last dimension, [..., D], in float32 inside."""

    @abstractmethod
    def linear(
        self, x: Tensor, w: Linear, *, norm: Norm | None = None, residual: Tensor | None = None
    ) -> Tensor:
        """residual + w(norm(x)), [N, in] -> [N, out]."""

    @abstractmethod
    def softcap(self, logits: Tensor, cap: float) -> Tensor:
        """cap · tanh(logits / cap), [N, V] float32."""

    @abstractmethod
    def prefill_attention(
        self, spec: ModelSpec, runs: Sequence[tuple[KvCache, int]], positions: Tensor
    ) -> Attention:
        """Causal attention of long runs of new tokens, each over its own cache and itself.

        Args:
            runs: each sequence's cache, and how many rows of the batch are its next tokens.
            positions: [N] int64, of all rows.
        """

    @abstractmethod
    def decode_attention(self, spec: ModelSpec, pool: KvPool, rows: RowTable) -> Attention:
        """Causal attention of a few new tokens of each of many sequences of one pool."""

    @abstractmethod
    def add_statistic(self, s2: Tensor, z: Tensor, squares: Tensor | None, runs: RowRuns) -> None:
        """Adds to s2 [R, F] float32, in place, Σ_t Z_tf² / ‖Z_t‖² over each of R runs of rows.

        A zero row, which ReLU can give, adds nothing; so does one whose squares underflow.

        Args:
            s2: its rows may lie apart.
            z: [N, F].
            squares: as of ``FeedForward.activations``.
        """

    def new_pool(self, spec: ModelSpec, tokens: int) -> KvPool:
        """Room for the keys and values of that many tokens."""
        shape = (2, spec.kv_heads, tokens + 1, spec.head_dim)
        return KvPool(
            [torch.empty(shape, dtype=self.dtype, device=self.device) for _ in spec.layers]
        )

    @abstractmethod
    def sampler_slots(self, slots: int, vocabulary: int) -> SamplerSlots:
        """State of the draws of ``slots`` sessions and one padding slot."""

    # -- the device ------------------------------------------------------------------------------

    default_chunk_tokens = 512
    """Prompt tokens of a pass: enough for products to run at the device's rate, and no more, since
    streams wait meanwhile."""

    claims_memory = False
    """Whether the device's memory is claimed for sessions at start; on a CPU, pages are taken as
    they are filled."""

    overlaps = False
    """Whether the device runs a step while the host does something else."""

    captures = False
    """Whether all operations can be captured as a graph (``capture``)."""

    def prepare_thread(self) -> None:  # noqa: B027
        """To be called once on the thread that runs the model."""

    def synchronize(self) -> None:  # noqa: B027
        """Waits until the device has done what it was given. A GPU that is lost raises here."""

    def moment(self) -> Moment:
        """Now, or on a GPU when it has done what it was given so far; it is not waited for."""
        return time.perf_counter()

    def event(self) -> torch.cuda.Event | None:
        """On a GPU, when it has done what it was given so far; None where work is done at once."""
        return None
