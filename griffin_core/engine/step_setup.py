"""What runs an engine's decode steps and prompts: chosen by backend and options, prepared at start.

On a GPU that captures graphs, this takes seconds to minutes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch

from griffin_core.engine.device_memory import format_bytes, step_rows
from griffin_core.errors import DeviceMemoryExhausted, InvalidRequest
from griffin_core.forward.decode import EagerStep, Stepper
from griffin_core.forward.invariant import InvariantStep
from griffin_core.forward.prefill import Launch, launch
from griffin_core.kv.pool import KvPool
from griffin_core.model.decoder import Decoder
from griffin_core.sampling.sampler import Sampler
from griffin_core.slim.base import SlimForm, SlimTable
from griffin_core.slim.blocks import BlockTable
from griffin_core.slim.costs import StepCosts, measure_costs
from griffin_core.slim.packed import Packed


@dataclass(frozen=True, kw_only=True)
class PreparedSteps:
    """What runs steps and passes over prompts.

    Args:
        stepper: runs decode steps.
        launch: runs a pass over prompts.
        measure_costs: measures what a step costs, which takes seconds.
    """

    stepper: Stepper
    launch: Launch
    measure_costs: Callable[[], StepCosts]


class StepSetup:
    """Prepares the steps of one engine.

    Args:
        form: how blocks on experts are built; None for what the backend does best.
        max_sessions: most sessions in a step.
        chunk_tokens: most tokens of a pass over prompts.
        graphs: whether to capture graphs on a backend that can.
        batch_invariant: see ``Engine``.
        rank: the highest rank of a residual, on a backend that takes memory for it at start.
    """

    def __init__(
        self,
        decoder: Decoder,
        form: SlimForm | None,
        *,
        max_sessions: int,
        chunk_tokens: int,
        graphs: bool,
        batch_invariant: bool,
        rank: int,
    ) -> None:
        self.form = form or (None if decoder.backend.captures else Packed())
        """How blocks on experts are built; None where ``table`` holds the expert sets itself."""
        self.table: SlimTable = _slim_table(decoder, self.form, max_sessions, rank)
        """Says what slim ids stand for."""
        self._decoder = decoder
        self._rank = rank
        self._max_sessions = max_sessions
        self._chunk_tokens = chunk_tokens
        self._graphs = graphs
        self._batch_invariant = batch_invariant

    def prepare(
        self, pool: KvPool, sampler: Sampler, progress: Callable[[str], None]
    ) -> PreparedSteps:
        """Prepares everything.

        Args:
            progress: is told about each slow part; may raise to end it.

        Raises:
            DeviceMemoryExhausted: graphs do not fit the device.
            InvalidRequest: ``batch_invariant`` cannot be had on this device in this dtype.
        """
        try:
            if self.form is not None:
                return self._prepare_eager(pool, sampler, self.form)
            return self._prepare_graphs(pool, sampler, progress)
        except torch.OutOfMemoryError as error:
            device = self._decoder.device
            free, _ = torch.cuda.mem_get_info(device)
            raise DeviceMemoryExhausted(
                f"the steps' graphs do not fit {device}: {format_bytes(free)} are free besides the "
                "weights and the sessions' memory"
            ) from error

    def _prepare_eager(self, pool: KvPool, sampler: Sampler, form: SlimForm) -> PreparedSteps:
        assert isinstance(self.table, BlockTable)
        decoder, table = self._decoder, self.table
        stepper: Stepper
        if self._batch_invariant:
            stepper = invariant = InvariantStep(
                decoder=decoder, pool=pool, sampler=sampler, slims=table
            )
            self._check_invariance(invariant.rows_stay_apart)
        else:
            stepper = EagerStep(decoder=decoder, pool=pool, sampler=sampler, slims=table)
        return PreparedSteps(
            stepper=stepper, launch=launch, measure_costs=partial(measure_costs, decoder, form)
        )

    def _prepare_graphs(
        self, pool: KvPool, sampler: Sampler, progress: Callable[[str], None]
    ) -> PreparedSteps:
        # These need triton, which a server without a GPU does not import.
        from griffin_core.forward.graphs import GraphStep  # noqa: PLC0415
        from griffin_core.forward.prompt_graphs import PromptGraphs  # noqa: PLC0415
        from griffin_core.slim.indexed import IndexTable  # noqa: PLC0415

        assert isinstance(self.table, IndexTable)
        run: Launch = launch
        if self._graphs:
            run = PromptGraphs(
                self._decoder,
                pool,
                most_tokens=self._chunk_tokens,
                tails=self._rank > 0,
                progress=progress,
            ).launch
        step = GraphStep(
            decoder=self._decoder,
            pool=pool,
            sampler=sampler,
            slims=self.table,
            max_sequences=step_rows(self._max_sessions),
            graphs=self._graphs,
            apart=self._batch_invariant,
            progress=progress,
        )
        self._check_invariance(step.rows_stay_apart)
        return PreparedSteps(stepper=step, launch=run, measure_costs=step.measure_costs)

    def _check_invariance(self, holds: Callable[[], bool]) -> None:
        if self._batch_invariant and not holds():
            decoder = self._decoder
            raise InvalidRequest(
                "batch_invariant",
                f"true with {decoder.dtype} on this {decoder.device.type}",
                "false: its products of equally many rows depend on a row's place",
            )


def _slim_table(decoder: Decoder, form: SlimForm | None, sessions: int, rank: int) -> SlimTable:
    if form is not None:
        return BlockTable(decoder)
    from griffin_core.slim.indexed import IndexTable  # noqa: PLC0415  # needs triton

    # A score may run on another set than its session.
    return IndexTable(decoder, sets=2 * sessions, rank=rank)
