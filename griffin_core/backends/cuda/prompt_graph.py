"""Short prompts as CUDA graphs: a pass over one of them is a single launch.

A pass over a few hundred tokens keeps a GPU busy for less time than the host takes to launch its
kernels, some fifteen a layer. Captured for a few sizes, it is launched at once. A prompt of another
length runs in the next larger size: the rows after it are computed and have no effect, since
attention is causal, the statistic is taken of the prompt's rows alone, and only those go into the
cache. The graph finds the cache by its addresses, in a table on the device.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from griffin_core.backends.cuda import on_device
from griffin_core.backends.cuda.rotary import Places
from griffin_core.experts.statistic import RowRuns
from griffin_core.forward.prefill import Part, Pass, Tell, counting_ff, launch, moment
from griffin_core.model.attention import rotation, visible_tokens
from griffin_core.model.decoder import Batch, Decoder, TokenRun

SIZES = (128, 256, 512)
"""Tokens of the graphs. Up to 256 reading the weights takes longer than the products do, so that
rows that pad cost nothing; for 1024 and more the host keeps up without a graph."""


@dataclass(frozen=True, kw_only=True)
class Captured:
    """A graph, and the memory it reads and writes.

    Args:
        ids: [N] int64; the prompt's come first.
        numbers: [L + 4] int64: capacity of the cache, position of the first token, bounds of the
            rows, addresses of the cache's layers: what ``Places`` is made of.
        hidden: [N, D], output of the last layer.
        s2: [1, L, F] float32.
    """

    graph: torch.cuda.CUDAGraph
    ids: Tensor
    numbers: Tensor
    hidden: Tensor
    s2: Tensor


class PromptGraphs:
    """Passes, as ``prefill.launch`` runs them, with graphs for single short prompts. What a graph
    has written is good until its next launch, so a pass is to be ended before the next begins.

    Args:
        most_tokens: larger graphs than for that many are not captured.
        progress: is told what is being captured.
    """

    def __init__(
        self, decoder: Decoder, *, most_tokens: int, progress: Callable[[str], None] | None = None
    ) -> None:
        self._decoder = decoder
        most = min(most_tokens, decoder.spec.context_length)
        self._graphs: dict[int, Captured] = {}
        pool = None
        stream = torch.cuda.Stream(decoder.device)
        with torch.inference_mode():
            for size in sorted((size for size in SIZES if size <= most), reverse=True):
                if progress is not None:
                    progress(f"capturing a prompt of {size} tokens")
                captured = self._capture(size, pool, stream)
                pool = pool or captured.graph.pool()
                self._graphs[size] = captured

    def launch(self, decoder: Decoder, parts: Sequence[Part], tell: Tell = lambda *_: None) -> Pass:
        """As ``prefill.launch``."""
        part = parts[0]
        prompt, cache = part.prompt, part.prompt.cache
        size = min((size for size in self._graphs if size >= part.tokens), default=None)
        alone = len(parts) == 1 and cache.length == 0
        if not alone or size is None or prompt.wants_kv or prompt.watch:
            return launch(decoder, parts, tell)
        if part.tokens > cache.capacity:
            raise ValueError(f"{part.tokens} tokens do not fit a cache of {cache.capacity}")
        began = moment(decoder.device)
        captured = self._graphs[size]
        captured.ids[: part.tokens].copy_(prompt.next_ids(part.tokens))
        numbers = [cache.capacity, 0, 0, part.tokens, *cache.addresses]
        captured.numbers.copy_(on_device(numbers, torch.int64, decoder.device))
        captured.graph.replay()
        return Pass(
            decoder=decoder,
            parts=parts,
            rows=(0, part.tokens),
            hidden=captured.hidden,
            s2=captured.s2.clone(),  # a session keeps it
            began=began,
        )

    def _capture(self, size: int, pool: Any, stream: torch.cuda.Stream) -> Captured:
        device = self._decoder.device
        ids = torch.zeros(size, dtype=torch.int64, device=device)
        # No rows are a prompt's, so that nothing is written while kernels are compiled.
        nothing = [0] * (4 + len(self._decoder.layers))
        numbers = on_device(nothing, torch.int64, device)
        self._run(ids, numbers)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=pool, stream=stream):
            hidden, s2 = self._run(ids, numbers)
        return Captured(graph=graph, ids=ids, numbers=numbers, hidden=hidden, s2=s2)

    def _run(self, ids: Tensor, numbers: Tensor) -> tuple[Tensor, Tensor]:
        """The last layer's output [N, D], and the statistic [1, L, F]."""
        decoder, spec, size = self._decoder, self._decoder.spec, len(ids)
        device = decoder.device
        places = Places(
            capacities=numbers[:1],
            starts=numbers[1:2],
            bounds=numbers[2:4],
            addresses=numbers[4:, None],
        )
        windows = {layer.window for layer in spec.layers}
        run = TokenRun(
            cache=None,
            start=0,
            first_row=0,
            tokens=size,
            visible={window: visible_tokens(0, size, window, device) for window in windows},
        )
        positions = torch.arange(size, device=device)
        batch = Batch(
            runs=(run,),
            rotations=tuple(rotation(r, positions, decoder.dtype) for r in spec.rotaries),
            table=None,
            places=places,
        )
        s2 = torch.zeros((1, len(decoder.layers), spec.ff_width), device=device)
        rows = RowRuns(bounds=(0, size), on_device=places.bounds.int())
        x = decoder.embed(ids, positions)
        for layer in range(len(decoder.layers)):
            x = decoder.layer(layer, x, batch, counting_ff(decoder, layer, s2, rows))
        return x, s2
