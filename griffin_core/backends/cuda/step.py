"""A decode step on a GPU: every live session's next token, run and drawn in one CUDA graph.

Graphs are captured for batch sizes of powers of two and for four ways to run the FF: dense; one set
for all; a set for each, which few sessions are fastest with; and zeroed, all weights read once for
all sessions and each one's activations zeroed outside its set, which gives the same as a set for
each at what dense costs. What differs from step to step, sampler slots, lengths, where caches and
expert sets lie, stands in one table in device memory, so sessions come, go and change their experts
without a new capture. The tokens themselves stay on the device: a step reads those that the step
before has drawn, so it may be launched before the host knows them.
"""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from types import MappingProxyType
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from griffin_core.backends.cuda.attention import DeviceCaches, attend_caches, plan
from griffin_core.backends.cuda.expert_table import ExpertTable, IndexSets
from griffin_core.backends.cuda.feedforward import (
    MAX_SHARED_TOKENS,
    feedforward,
    feedforward_on_all,
)
from griffin_core.backends.cuda.matvec import matvec, rms_norm
from griffin_core.experts.selection import Selection
from griffin_core.forward.decode import DrawLost, Draws, JoinedDraws, StepRow, draw_of
from griffin_core.forward.invariant import ROWS
from griffin_core.model.attention import Rotation, rotation
from griffin_core.model.decoder import Decoder, Norm
from griffin_core.model.hub import Progress
from griffin_core.model.linear import Linear
from griffin_core.sampling.params import SamplingParams
from griffin_core.sampling.sampler import Sampler
from griffin_core.slim.costs import ASSUMED_COSTS, GraphCosts, StepCosts
from griffin_core.slim.indexed import IndexedFF

FFMode = Literal["dense", "shared", "private", "zeroed"]
MODES: tuple[FFMode, ...] = ("dense", "shared", "private", "zeroed")

PROGRAMS = 2
"""Attention programs resident per streaming multiprocessor."""

MOST_PRIVATE, ROUNDS = 8, 5
"""Most sessions that may run on a set each, and how often steps are timed. At density 0.25 sets of
their own cost as much as dense with four sessions (docs/BENCHMARKS.md)."""

SLOTS, STARTS, POSITIONS, CAPACITIES, COUNTS, TABLES = range(6)
"""Rows of ``StepInputs``; from TABLES on, L of cache addresses, then L of expert sets."""

BUFFERS = 2
"""Host copies of a step's table: one may still be on its way to the device while the next is
written."""


@dataclass(frozen=True, kw_only=True)
class Made:
    """What a captured step leaves on the device, good until the next one.

    Args:
        tokens: [N] int64.
        logits: [N, V] float32 that they were drawn from.
    """

    tokens: Tensor
    logits: Tensor


class StepInputs:
    """The table of a step of up to N sessions, on the host and on the device.

    Rows of sessions that are not there point to a cache of one token and to a set of one neuron.

    Args:
        tokens: N.
        padding: the column [5 + 2 L] of such a row; its sets begin with the set of all neurons.
        ff_width: how many those are.
    """

    def __init__(self, tokens: int, padding: Tensor, ff_width: int, device: torch.device) -> None:
        self.tokens = tokens
        self._layers = (padding.shape[0] - TABLES) // 2
        self._padding = padding.numpy()
        self._ff_width = ff_width
        self._table = padding[:, None].repeat(1, tokens).numpy()
        buffers = [torch.from_numpy(self._table).clone().pin_memory() for _ in range(BUFFERS)]
        self._device = buffers[0].to(device)
        self._sent = [(buffer, torch.cuda.Event()) for buffer in buffers]
        self._held: list[object] = [None] * tokens

    @property
    def slots(self) -> Tensor:
        """[N] int64, as are the others."""
        return self._device[SLOTS]

    @property
    def starts(self) -> Tensor:
        """Positions of the tokens that are run."""
        return self._device[STARTS]

    @property
    def positions(self) -> Tensor:
        """Positions of the tokens that are drawn."""
        return self._device[POSITIONS]

    @property
    def caches(self) -> DeviceCaches:
        return DeviceCaches(
            addresses=self._device[TABLES : TABLES + self._layers],
            starts=self._device[STARTS],
            capacities=self._device[CAPACITIES],
        )

    def experts(self, layer: int, *, shared: bool) -> ExpertTable:
        return ExpertTable(
            addresses=self._device[TABLES + self._layers + layer],
            counts=self._device[COUNTS],
            shared=shared,
        )

    def fill(self, sessions: Sequence[StepRow]) -> None:
        """Writes the sessions' rows, on the host."""
        table = self._table
        for column, session in enumerate(sessions):
            cache, block = session.cache, session.view[0]
            if cache.length >= cache.capacity:
                raise ValueError(f"a token at {cache.length} does not fit {cache.capacity}")
            held = self._held[column]
            # Whose addresses a column has: a cache that is resized has a new list of them.
            if not (isinstance(held, tuple) and held[0] is cache.addresses and held[1] is block):
                self._held[column] = None  # whatever goes wrong, mark the column as padding
                self._write_tables(column, session)
                self._held[column] = cache.addresses, block
            table[SLOTS, column] = session.slot
            table[STARTS, column] = cache.length
            table[POSITIONS, column] = cache.length + 1
            table[CAPACITIES, column] = cache.capacity
        for column in range(len(sessions), self.tokens):
            if self._held[column] is not None:
                self._held[column] = None
                table[:, column] = self._padding

    def send(self) -> None:
        """To the device, in the order of its work."""
        host, sent = self._sent.pop(0)
        self._sent.append((host, sent))
        sent.synchronize()  # of the step before the last: long over, unless steps are not read
        host.numpy()[:] = self._table
        self._device.copy_(host, non_blocking=True)
        sent.record()

    def fill_usual(self, sets: IndexSets) -> None:
        """Gives each row a set of its own, of N, in all layers."""
        self._table[TABLES + self._layers :] = sets.addresses
        self._table[COUNTS] = sets.count
        self._held = [sets] * self.tokens  # so that the next ``fill`` writes every row

    def _write_tables(self, column: int, session: StepRow) -> None:
        table, layers = self._table, self._layers
        table[TABLES : TABLES + layers, column] = session.cache.addresses
        if isinstance(session.view[0], IndexedFF):
            blocks = [block for block in session.view if isinstance(block, IndexedFF)]
            table[TABLES + layers :, column] = [block.address for block in blocks]
            table[COUNTS, column] = blocks[0].count
        else:  # dense, beside others that are not
            table[TABLES + layers :, column] = self._padding[TABLES + layers]
            table[COUNTS, column] = self._ff_width


class CudaStep:
    """Runs decode steps of a model in bfloat16 or float16. A ``Stepper``.

    Args:
        sampler: draws the tokens.
        max_tokens: most sessions of a step. Graphs are captured for up to ``MAX_SHARED_TOKENS``;
            a larger step runs as several.
        graphs: capture them at all.
        apart: makes each row's result independent of the other rows, as in ``decode.apart``: a
            step has ``ROWS`` rows and runs zeroed; more sessions run as several such steps.
    """

    def __init__(
        self,
        decoder: Decoder,
        sampler: Sampler,
        *,
        max_tokens: int,
        graphs: bool,
        apart: bool = False,
        progress: Progress | None = None,
    ) -> None:
        self._decoder = decoder
        self._apart = apart
        self.sampler = sampler
        self._spec = decoder.spec
        properties = torch.cuda.get_device_properties(decoder.device)
        self._programs = PROGRAMS * properties.multi_processor_count
        spec = decoder.spec
        every = torch.arange(spec.ff_width, dtype=torch.int32, device=decoder.device)
        self._every = IndexSets(every[None], spec.ff_width)
        self._spare = torch.zeros(
            (2, spec.kv_heads, 1, spec.head_dim), dtype=decoder.dtype, device=decoder.device
        )
        layers = len(decoder.layers)
        addresses = [self._spare.data_ptr()] * layers + self._every.addresses * layers
        padding = torch.tensor([sampler.padding, 0, 1, 1, 1, *addresses])
        most = min(max_tokens, MAX_SHARED_TOKENS)
        sizes = [ROWS] if apart else [1 << power for power in range((most - 1).bit_length() + 1)]
        self._inputs = {
            size: StepInputs(size, padding, spec.ff_width, decoder.device) for size in sizes
        }
        self._graphs: dict[tuple[int, FFMode], tuple[torch.cuda.CUDAGraph, Made]] = {}
        self.private_up_to = {size: 1 / size for size in sizes if size <= MOST_PRIVATE}
        """By the size of a step, the largest mean density at which each row runs on a set of its
        own and not zeroed. Bytes decide until ``measure_costs`` has measured which is slower."""
        with torch.inference_mode():
            if graphs:
                self._capture(progress)

    @property
    def graphs(self) -> Mapping[tuple[int, FFMode], tuple[torch.cuda.CUDAGraph, Made]]:
        """The captured graphs and their outputs, by size and mode. Replay none of them."""
        return MappingProxyType(self._graphs)

    def _capture(self, progress: Progress | None) -> None:
        pool = None
        # torch's own is of the GPU that was captured on first, whichever that was.
        stream = torch.cuda.Stream(self._decoder.device)
        for size in reversed(self._inputs):
            if progress is not None:
                progress(f"capturing a step of {size}")
            inputs = self._inputs[size]
            inputs.fill_usual(self._random_sets(size, 0.5))  # configurations are chosen on these
            inputs.send()
            for mode in self._modes(size):
                self._run(inputs, mode)  # chooses configurations, allocates for cuBLAS
                torch.cuda.synchronize()
                graph = torch.cuda.CUDAGraph()
                with torch.cuda.graph(graph, pool=pool, stream=stream):
                    made = self._run(inputs, mode)
                pool = pool or graph.pool()
                self._graphs[size, mode] = graph, made

    def _random_sets(self, sets: int, density: float) -> IndexSets:
        k = Selection(density=density).experts_of(self._spec.ff_width)
        score = torch.rand((sets, self._spec.ff_width), device=self._decoder.device)
        experts = score.topk(k).indices.sort(dim=1).values.int()
        return IndexSets(experts, self._spec.ff_width)

    def measure_costs(self) -> StepCosts:
        """What steps cost, measured on the graphs, by which modes are chosen from now on; without
        graphs, what bytes say."""
        if not self._graphs:
            return ASSUMED_COSTS

        def seconds(mode: FFMode) -> dict[int, tuple[float, float]]:
            """On half of the neurons and on all, by captured size."""
            sizes = [size for size in self._inputs if (size, mode) in self._graphs]
            return {
                size: (self._seconds(size, mode, 0.5), self._seconds(size, mode, 1.0))
                for size in sizes
            }

        costs = GraphCosts(
            dense={size: whole for size, (_, whole) in seconds("dense").items()},
            zeroed={size: half for size, (half, _) in seconds("zeroed").items()},
            shared=seconds("shared"),
            private=seconds("private"),
        )
        self.private_up_to = {size: costs.private_up_to(size) for size in self.private_up_to}
        return costs

    def _seconds(self, size: int, mode: FFMode, density: float) -> float:
        inputs, (graph, _) = self._inputs[size], self._graphs[size, mode]
        inputs.fill_usual(self._random_sets(size, density))
        inputs.send()
        times = []
        for _ in range(ROUNDS + 1):  # the first warms up
            clock = time.perf_counter()
            graph.replay()
            torch.cuda.current_stream().synchronize()
            times.append(time.perf_counter() - clock)
        return statistics.median(times[1:])

    @torch.inference_mode()
    def launch(self, rows: Sequence[StepRow]) -> Draws:
        largest = max(self._inputs)
        if len(rows) > largest:
            first = self.launch(rows[:largest])
            try:
                return JoinedDraws(parts=[first, self.launch(rows[largest:])])
            except Exception as error:
                raise DrawLost from error
        size = next(size for size in self._inputs if size >= len(rows))
        inputs = self._inputs[size]
        inputs.fill(rows)
        inputs.send()
        mode = self.mode(rows, size)
        if (size, mode) in self._graphs:
            graph, made = self._graphs[size, mode]
            graph.replay()
        else:
            made = self._run(inputs, mode)
        count = len(rows)
        for row in rows:
            row.cache.advance(1)
        return draw_of(made.tokens[:count], [row.top_logprobs for row in rows], made.logits[:count])

    @torch.inference_mode()
    def rows_stay_apart(self) -> bool:
        """Tests whether each row's result is independent of the other rows, as
        ``apart.rows_stay_apart`` does. To be called before the first session."""
        draw, most = random.Random(0), min(ROWS, self.sampler.padding)
        token, *others = (draw.randrange(self._spec.vocabulary) for _ in range(most))
        alone = self._trial([token])[0]
        beside = [
            self._trial([*others[:place], token, *others[place:]])[place] for place in range(most)
        ]
        return all(torch.equal(alone, own) for own in beside)

    def _trial(self, tokens: Sequence[int]) -> Tensor:
        """Logits [N, V] of one step that runs each token after an empty context."""
        dense = [layer.ff for layer in self._decoder.layers]
        rows = []
        for slot, token in enumerate(tokens):
            self.sampler.open(slot, SamplingParams(), [])
            self.sampler.drawn[slot] = token
            rows.append(StepRow(cache=self._decoder.new_cache(1), view=dense, slot=slot))
        logits = self.launch(rows).logits.clone()
        for row in rows:
            self.sampler.close(row.slot)
        return logits

    def _modes(self, size: int) -> list[FFMode]:
        """The modes that a step of a captured size can run in."""
        if self._apart:
            return ["zeroed"]
        if size == 1:
            return ["dense", "private"]
        return [mode for mode in MODES if mode != "private" or size <= MOST_PRIVATE]

    def mode(self, rows: Sequence[StepRow], size: int) -> FFMode:
        """The cheapest mode in which every session runs on its own set."""
        if self._apart:
            return "zeroed"
        counts = [row.view[0].count for row in rows if isinstance(row.view[0], IndexedFF)]
        if not counts:
            return "dense"
        if len(rows) == 1:
            return "private"
        if len(counts) == len(rows) and len({id(row.view) for row in rows}) == 1:
            return "shared"
        neurons = sum(counts) + (len(rows) - len(counts)) * self._spec.ff_width
        mean = neurons / (len(rows) * self._spec.ff_width)
        return "private" if mean <= self.private_up_to.get(size, 0.0) else "zeroed"

    def _run(self, inputs: StepInputs, mode: FFMode) -> Made:
        decoder, spec = self._decoder, self._spec
        # A row whose logits were not finite has drawn -1; its session is about to be told.
        ids = self.sampler.drawn[inputs.slots].clamp_(min=0)
        x = decoder.embed(ids, inputs.starts)
        rotations = tuple(rotation(r, inputs.starts, decoder.dtype) for r in spec.rotaries)
        for index in range(len(decoder.layers)):
            x = self._layer(index, x, rotations, inputs, mode)
        norm = decoder.final_norm
        if norm is not None and not (x.shape[0] == 1 and _is_rms(norm)):
            x, norm = _normed(norm, x), None
        logits = decoder.head(x, partial(self._project, norm=norm))
        tokens = self.sampler.sample(logits, inputs.slots, inputs.positions)
        return Made(tokens=tokens, logits=logits)

    def _layer(
        self, index: int, x: Tensor, rotations: Sequence[Rotation], inputs: StepInputs, mode: FFMode
    ) -> Tensor:
        w, spec, before = self._decoder.layers[index], self._spec, self._spec.norm_before
        own = spec.layers[index]
        qkv = self._project(x, w.qkv, norm=w.attention_norm if before else None)
        norms = None
        if w.q_norm is not None and w.k_norm is not None:
            assert w.q_norm.weight is not None and w.k_norm.weight is not None
            norms = w.q_norm.weight, w.k_norm.weight, w.q_norm.eps
        attention = attend_caches(
            qkv.view(x.shape[0], spec.heads + 2 * spec.kv_heads, spec.head_dim),
            spec.heads,
            None if own.rotary is None else rotations[own.rotary],
            norms,
            inputs.caches,
            index,
            window=own.window,
            scale=spec.query_scale,
            softcap=spec.attention_softcap,
            how=plan(x.shape[0], spec.heads, spec.kv_heads, spec.head_dim, self._programs),
        )
        if w.attention_out_norm is not None:
            x = _normed(w.attention_out_norm, self._project(attention, w.o), residual=x)
        else:
            x = self._project(attention, w.o, residual=x)
        if not before:
            x = _normed(w.attention_norm, x)
        norm = w.ff_norm if before else None
        if w.ff_out_norm is not None:
            return _normed(w.ff_out_norm, self._feedforward(index, x, norm, inputs, mode), x)
        x = self._feedforward(index, x, norm, inputs, mode, residual=x)
        return x if before else _normed(w.ff_norm, x)

    def _project(
        self, x: Tensor, linear: Linear, *, norm: Norm | None = None, residual: Tensor | None = None
    ) -> Tensor:
        """residual + linear(norm(x))."""
        assert linear.weight is not None
        if x.shape[0] == 1:
            if norm is not None and not _is_rms(norm):
                x, norm = _normed(norm, x), None
            return matvec(x, linear.weight, linear.bias, norm=_fused(norm), residual=residual)
        if norm is not None:
            x = _normed(norm, x)
        y = F.linear(x, linear.weight, linear.bias)
        return y if residual is None else y.add_(residual)

    def _feedforward(
        self,
        index: int,
        x: Tensor,
        norm: Norm | None,
        inputs: StepInputs,
        mode: FFMode,
        residual: Tensor | None = None,
    ) -> Tensor:
        layer = self._decoder.layers[index]
        by_token = mode == "private" or (mode == "dense" and x.shape[0] == 1)
        if norm is not None and not (by_token and _is_rms(norm)):
            x, norm = _normed(norm, x), None
        if mode == "zeroed" or (mode == "dense" and not by_token):
            sets = None if mode == "dense" else inputs.experts(index, shared=False)
            y = feedforward_on_all(x, layer.ff, layer.neurons, sets)
            return y if residual is None else y.add_(residual)
        table = None if mode == "dense" else inputs.experts(index, shared=mode == "shared")
        return feedforward(x, layer.neurons, table, norm=_fused(norm), residual=residual)


def _is_rms(norm: Norm) -> bool:
    return norm.kind == "rms" and norm.weight is not None


def _fused(norm: Norm | None) -> tuple[Tensor, float] | None:
    if norm is None:
        return None
    assert norm.weight is not None
    return norm.weight, norm.eps


def _normed(norm: Norm, x: Tensor, residual: Tensor | None = None) -> Tensor:
    """residual + norm(x)."""
    if _is_rms(norm):
        assert norm.weight is not None
        return rms_norm(x, norm.weight, norm.eps, residual)
    y = norm(x)
    return y if residual is None else y + residual
