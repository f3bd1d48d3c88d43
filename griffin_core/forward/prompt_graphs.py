"""Prefill of short prompts as captured CUDA graphs, so that a pass is a single launch.

A pass over a few hundred tokens takes a GPU less time than the host needs to launch its kernels,
about fifteen per layer. So it is captured for a few sizes. A prompt of another length runs in the
next larger size: the padding rows after it have no effect, since attention is causal, and only the
prompt's rows count in the statistic and are stored in the KV pool.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from griffin_core.backends.batch import RowRuns
from griffin_core.backends.cuda.backend import CudaBackend
from griffin_core.backends.transfers import on_device
from griffin_core.experts.correction_fit import Tail
from griffin_core.forward.prefill import counting_ff, launch
from griffin_core.forward.prompt import (
    Part,
)
from griffin_core.forward.prompt_pass import Pass, Tell
from griffin_core.kv.pool import KvPool
from griffin_core.model.decoder import Decoder

SIZES = (128, 256, 512)
"""The sizes of the graphs in tokens. Up to 256 tokens reading the weights takes longer than the
arithmetic, so padding rows cost nothing; from 1024 tokens on the host keeps up without a graph."""


@dataclass(frozen=True, kw_only=True)
class Captured:
    """A graph, and the memory it reads and writes.

    Args:
        ids: [N] int64; those of the prompt come first.
        numbers: [3] int64: the KV slot of the first token, 0, and the number of tokens of the
            prompt.
        hidden: [N, D], output of the last layer.
        sums: [1, 3, L, F] float32.
        tails: of each layer, the input [N, D] of the FF and its activations [N, F]; none if no
            residual is to be fitted.
    """

    graph: torch.cuda.CUDAGraph
    ids: Tensor
    numbers: Tensor
    hidden: Tensor
    sums: Tensor
    tails: Sequence[Tail]


class PromptGraphs:
    """Runs passes like ``prefill.launch``, with graphs for single short prompts. A graph's output
    is valid until its next launch, so a pass must be ended before the next one is launched.

    Args:
        pool: holds the KV of the prompts that run as graphs.
        most_tokens: graphs for more tokens are not captured.
        tails: whether graphs keep what residuals are fitted to, which takes L · N · (D + F) values
            for the N tokens of all graphs together.
        progress: called with a description of what is being captured.
    """

    def __init__(
        self,
        decoder: Decoder,
        pool: KvPool,
        *,
        most_tokens: int,
        tails: bool = False,
        progress: Callable[[str], None] | None = None,
    ) -> None:
        assert isinstance(decoder.backend, CudaBackend)
        self._decoder = decoder
        self._backend = decoder.backend
        self._pool = pool
        most = min(most_tokens, decoder.spec.context_length)
        self._tails = tails
        self._graphs: dict[int, Captured] = {}
        memory = None
        stream = torch.cuda.Stream(decoder.device)  # type: ignore[no-untyped-call]
        with torch.inference_mode():
            for size in sorted((size for size in SIZES if size <= most), reverse=True):
                if progress is not None:
                    progress(f"capturing a prompt of {size} tokens")
                captured = self._capture(size, memory, stream)
                memory = memory or captured.graph.pool()
                self._graphs[size] = captured

    def launch(self, decoder: Decoder, parts: Sequence[Part], tell: Tell = lambda *_: None) -> Pass:
        """See ``prefill.launch``."""
        part = parts[0]
        prompt, cache = part.prompt, part.prompt.cache
        size = min((size for size in self._graphs if size >= part.tokens), default=None)
        alone = len(parts) == 1 and cache.length == 0 and cache.pool is self._pool
        needs_more = prompt.wants_kv or prompt.watch or (part.rows_fitted and not self._tails)
        if not alone or size is None or needs_more:
            return launch(decoder, parts, tell)
        if part.tokens > cache.capacity:
            raise ValueError(f"{part.tokens} tokens do not fit a cache of {cache.capacity}")
        began = self._backend.timestamp()
        captured = self._graphs[size]
        captured.ids[: part.tokens].copy_(prompt.next_ids(part.tokens))
        numbers = [cache.first_slot, 0, part.tokens]
        captured.numbers.copy_(on_device(numbers, torch.int64, decoder.device))
        captured.graph.replay()
        return Pass(
            decoder=decoder,
            parts=parts,
            rows=(0, part.tokens),
            hidden=captured.hidden,
            sums=captured.sums.clone(),  # a session keeps them
            tails=[self._tails_of(captured, part)],
            began=began,
        )

    @staticmethod
    def _tails_of(captured: Captured, part: Part) -> list[Tail]:
        """Copies what a residual is fitted to, before the next launch overwrites it."""
        rows = slice(part.tokens - part.rows_fitted, part.tokens)
        if not part.rows_fitted:
            return []
        return [Tail(x=each.x[rows].clone(), z=each.z[rows].clone()) for each in captured.tails]

    def _capture(self, size: int, memory: Any, stream: torch.cuda.Stream) -> Captured:
        device = self._decoder.device
        ids = torch.zeros(size, dtype=torch.int64, device=device)
        # No row belongs to a prompt, so that nothing is stored while kernels are compiled.
        numbers = on_device([0, 0, 0], torch.int64, device)
        self._run(ids, numbers)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=memory, stream=stream):
            hidden, sums, tails = self._run(ids, numbers)
        return Captured(
            graph=graph, ids=ids, numbers=numbers, hidden=hidden, sums=sums, tails=tails
        )

    def _run(self, ids: Tensor, numbers: Tensor) -> tuple[Tensor, Tensor, list[Tail]]:
        """Returns the last layer's output [N, D], the statistics [1, 3, L, F], and the tails."""
        decoder, spec, size = self._decoder, self._decoder.spec, len(ids)
        positions = torch.arange(size, device=decoder.device)
        places = torch.where(positions < numbers[2], positions + numbers[0], -1)
        attention = self._backend.padded_prefill_attention(spec, self._pool, positions, places)
        shape = (1, 3, len(decoder.layers), spec.intermediate_size)
        sums = torch.zeros(shape, device=decoder.device)
        rows = RowRuns(bounds=(0, size), on_device=numbers[1:].int())
        x = decoder.embed(ids, positions)
        tails: list[Tail] = []

        def keep(x: Tensor, z: Tensor) -> None:
            tails.append(Tail(x=x, z=z))

        ff = partial(counting_ff, decoder, sums=sums, runs=rows, keep=keep if self._tails else None)
        return decoder.forward(x, attention, ff), sums, tails
