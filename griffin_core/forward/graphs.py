"""Decode steps as captured CUDA graphs: one launch runs the model and samples the next token of
every live session.

Graphs are captured for batch sizes of powers of two and for each way to run the FF
(``slim.indexed.FFMode``). Everything that differs from step to step is in one small table of
integers on the device, so sessions can start, end and change their experts without a new capture.
Tokens stay on the device: a step reads the tokens that the previous step sampled, so it can be
launched before the host has read them.
"""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType

import torch
from torch import Tensor

from griffin_core.backends.batch import (
    DRAWN,
    PADDING,
    RowTable,
    StepBatch,
    StepSequence,
)
from griffin_core.backends.cuda.feedforward import MAX_SHARED_TOKENS
from griffin_core.forward.decode import step_logits, token_ids
from griffin_core.forward.draws import Draw, DrawLost, Draws, JoinedDraws
from griffin_core.forward.invariant import ROWS
from griffin_core.kv.pool import KvPool
from griffin_core.model.decoder import Decoder
from griffin_core.model.hub import Progress
from griffin_core.sampling.params import SamplingParams
from griffin_core.sampling.sampler import Sampler
from griffin_core.slim.costs import ASSUMED_COSTS, GraphCosts, StepCosts
from griffin_core.slim.indexed import MODES, FFMode, IndexTable

MOST_PRIVATE, ROUNDS = 8, 5
"""The most rows that may run on private sets, and how often steps are timed. At density 0.25 the
private sets of four sessions cost as much as a dense step (docs/BENCHMARKS.md)."""

BUFFERS = 2
"""The number of host buffers for a step's table: while one is being copied to the device, the next
can be written."""


@dataclass(frozen=True, kw_only=True)
class StepOutput:
    """The output of a step on the device, valid until the next step.

    Args:
        tokens: [N] int64.
        logits: [N, V] float32, from which the tokens were sampled.
    """

    tokens: Tensor
    logits: Tensor


class StepTable:
    """The table of a step of N rows, at a fixed address on the device, filled from pinned memory.

    Args:
        rows: N.
        padding: the sampler slot of rows that draw no token.
        slim_id: the slim id of padding rows.
    """

    def __init__(self, rows: int, device: torch.device, padding: int, slim_id: int) -> None:
        self._padding = padding
        empty = replace(PADDING, slim_id=slim_id)
        batch = StepBatch(sequences=(empty,) * rows, padding=padding)
        host = torch.tensor(batch.columns(), dtype=torch.int64).t().contiguous()
        self._empty = host.numpy().copy()
        buffers = [host.clone().pin_memory() for _ in range(BUFFERS)]
        self.rows = RowTable(table=host.to(device))
        self._sent = [
            (buffer, torch.cuda.Event())  # type: ignore[no-untyped-call]
            for buffer in buffers
        ]

    def send(self, sequences: Sequence[StepSequence]) -> None:
        """Copies the rows of sequences to the device in stream order; the remaining rows are
        padding."""
        host, sent = self._sent.pop(0)
        self._sent.append((host, sent))
        sent.synchronize()  # the copy of the step before last
        columns = StepBatch(sequences=tuple(sequences), padding=self._padding).columns()
        table = host.numpy()
        table[:] = self._empty
        table[:, : len(columns)] = list(zip(*columns, strict=True))
        self.rows.table.copy_(host, non_blocking=True)
        sent.record()


class GraphStep:
    """A ``Stepper`` that runs the decode steps of a model in bfloat16 or float16 as graphs.

    Args:
        sampler: samples the tokens.
        slims: the table of slim ids.
        max_sequences: the most sequences in a step. Graphs are captured for up to
            ``MAX_SHARED_TOKENS`` rows; a larger step runs as several.
        graphs: whether to capture graphs at all.
        apart: whether each row's result must be independent of the other rows, as in
            ``forward.invariant``: a step has ``ROWS`` rows and runs zeroed; more sequences run as
            several such steps.
        progress: called with a description of what is being captured.
    """

    def __init__(
        self,
        *,
        decoder: Decoder,
        pool: KvPool,
        sampler: Sampler,
        slims: IndexTable,
        max_sequences: int,
        graphs: bool = True,
        apart: bool = False,
        progress: Progress | None = None,
    ) -> None:
        self.sampler = sampler
        self.slims = slims
        self._decoder = decoder
        self._pool = pool
        self._apart = apart
        most = min(max_sequences, MAX_SHARED_TOKENS)
        sizes = [ROWS] if apart else [1 << power for power in range((most - 1).bit_length() + 1)]
        self._tables = {
            size: StepTable(size, decoder.device, sampler.padding, slims.padding) for size in sizes
        }
        self._graphs: dict[tuple[int, FFMode], tuple[torch.cuda.CUDAGraph, StepOutput]] = {}
        self.private_up_to = {size: 1 / size for size in sizes if size <= MOST_PRIVATE}
        """For each step size, the largest mean density at which rows run on private sets and not
        zeroed. It is estimated from bytes until ``measure_costs`` has measured which is slower."""
        if graphs:
            with torch.inference_mode():
                self._capture(progress)

    @property
    def graphs(self) -> Mapping[tuple[int, FFMode], tuple[torch.cuda.CUDAGraph, StepOutput]]:
        """The captured graphs and their outputs, by size and mode. For inspection only: do not
        replay them."""
        return MappingProxyType(self._graphs)

    @property
    def most_rows(self) -> int | None:
        """See ``Stepper``: the rows of the largest graph."""
        return max(self._tables)

    @torch.inference_mode()
    def launch(
        self, sequences: Sequence[StepSequence], top_logprobs: Sequence[int | None]
    ) -> Draws:
        """See ``Stepper``."""
        rows = sum(len(each.token_ids) for each in sequences)
        largest = max(self._tables)
        # Their logits are read, and the next graph would overwrite a graph's logits.
        reads_logits = any(each.slot is None or len(each.token_ids) > 1 for each in sequences)
        if reads_logits and (self._apart or rows > largest):
            return self._launch_eager(sequences, top_logprobs)
        if rows > largest:
            first = self.launch(sequences[:largest], top_logprobs[:largest])
            try:
                rest = self.launch(sequences[largest:], top_logprobs[largest:])
                return JoinedDraws(parts=[first, rest])
            except Exception as error:
                raise DrawLost from error
        size = next(size for size in self._tables if size >= rows)
        table = self._tables[size]
        table.send(sequences)
        mode = self.mode(sequences, size)
        if (size, mode) in self._graphs:
            graph, output = self._graphs[size, mode]
            graph.replay()
        else:
            output = self._run(table.rows, mode)
        return Draw.of(output.tokens[:rows], output.logits[:rows], sequences, top_logprobs)

    def _launch_eager(
        self, sequences: Sequence[StepSequence], top_logprobs: Sequence[int | None]
    ) -> Draws:
        """Runs a step of more tokens than any graph has rows."""
        batch = StepBatch(sequences=tuple(sequences), padding=self.sampler.padding)
        mode = self.mode(sequences, batch.rows)
        output = self._run(RowTable.of(batch, self._decoder.device), mode)
        return Draw.of(output.tokens, output.logits, sequences, top_logprobs)

    def mode(self, sequences: Sequence[StepSequence], size: int) -> FFMode:
        """Returns the cheapest mode in which every sequence runs on its own set, in a step of a
        given size."""
        if self._apart:
            return "zeroed"
        ids = [each.slim_id for each in sequences for _ in each.token_ids]
        if not any(ids):
            return "dense"
        if len(ids) == 1:
            return "private"
        if len(set(ids)) == 1:
            return "shared"
        neurons = sum(self.slims.counts[slim_id] for slim_id in ids)
        mean = neurons / (len(ids) * self.slims.all_neurons)
        return "private" if mean <= self.private_up_to.get(size, 0.0) else "zeroed"

    def _run(self, rows: RowTable, mode: FFMode) -> StepOutput:
        ids = token_ids(rows, self.sampler.drawn)
        ff = self.slims.run(rows, mode)
        logits = step_logits(self._decoder, self._pool, rows, ids, ff)
        tokens = self.sampler.sample(logits, rows.slots, rows.positions + 1)
        return StepOutput(tokens=tokens, logits=logits)

    # -- at start --------------------------------------------------------------------------------

    def _capture(self, progress: Progress | None) -> None:
        pool = None
        # torch's default capture stream belongs to the GPU of the first capture.
        stream = torch.cuda.Stream(self._decoder.device)  # type: ignore[no-untyped-call]
        self.slims.write_random(0.5, max(self._tables))  # autotuning measures on these sets
        for size in reversed(self._tables):
            if progress is not None:
                progress(f"capturing a step of {size}")
            table = self._tables[size]
            table.send(self._usual(size))
            for mode in self._modes(size):
                self._run(table.rows, mode)  # runs autotuning and allocates cuBLAS workspaces
                torch.cuda.synchronize()
                graph = torch.cuda.CUDAGraph()
                with torch.cuda.graph(graph, pool=pool, stream=stream):
                    output = self._run(table.rows, mode)
                pool = pool or graph.pool()
                self._graphs[size, mode] = graph, output

    def _modes(self, size: int) -> list[FFMode]:
        """Returns the modes that a step of a captured size can run in."""
        if self._apart:
            return ["zeroed"]
        if size == 1:
            return ["dense", "private"]
        return [mode for mode in MODES if mode != "private" or size <= MOST_PRIVATE]

    def _usual(self, size: int) -> list[StepSequence]:
        """Returns warm-up sequences that run on private sets, as far as the table has enough
        sets."""
        sets = self.slims.sets
        return [
            StepSequence(
                first_slot=PADDING.first_slot,
                cached=0,
                token_ids=(DRAWN,),
                slim_id=1 + row % sets,
                slot=self.sampler.padding,
            )
            for row in range(size)
        ]

    def measure_costs(self) -> StepCosts:
        """Measures the cost of steps on the graphs, and chooses modes by it from now on. Without
        graphs it returns costs estimated from bytes."""
        if not self._graphs:
            return ASSUMED_COSTS

        def seconds(mode: FFMode) -> dict[int, tuple[float, float]]:
            """Returns the seconds on half of the neurons and on all neurons, by captured size."""
            sizes = [size for size in self._tables if (size, mode) in self._graphs]
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
        graph, _ = self._graphs[size, mode]
        self.slims.write_random(density, size)
        self._tables[size].send(self._usual(size))
        times = []
        for _ in range(ROUNDS + 1):  # the first round warms up
            clock = time.perf_counter()
            graph.replay()
            torch.cuda.current_stream().synchronize()
            times.append(time.perf_counter() - clock)
        return statistics.median(times[1:])

    @torch.inference_mode()
    def rows_stay_apart(self) -> bool:
        """Tests whether each row's result is independent of the other rows, as
        ``InvariantStep.rows_stay_apart`` does. Call it before the first session."""
        draw, most = random.Random(0), min(ROWS, self.sampler.padding)
        vocab_size = self._decoder.spec.vocab_size
        token, *others = (draw.randrange(vocab_size) for _ in range(most))
        alone = self._trial([token])[0]
        beside = [
            self._trial([*others[:place], token, *others[place:]])[place] for place in range(most)
        ]
        return all(torch.equal(alone, own) for own in beside)

    def _trial(self, tokens: Sequence[int]) -> Tensor:
        """Returns the logits [N, V] of one step that runs each token as the first of a sequence."""
        caches = [self._pool.allocate(1) for _ in tokens]
        sequences = []
        for slot, (token, cache) in enumerate(zip(tokens, caches, strict=True)):
            self.sampler.open(slot, SamplingParams(), [])
            sequences.append(
                StepSequence(first_slot=cache.first_slot, cached=0, token_ids=(token,), slot=slot)
            )
        logits = self.launch(sequences, [None] * len(tokens)).logits.clone()
        for slot, cache in enumerate(caches):
            self.sampler.close(slot)
            cache.free()
        return logits
