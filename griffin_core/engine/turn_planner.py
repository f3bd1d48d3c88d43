"""From a task to a turn: what it does, on which experts, and the most bytes it comes to hold."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from griffin_core.engine.density_control import DENSITIES, WARMUP_TOKENS, DensityControl
from griffin_core.engine.expert_groups import ExpertGroups
from griffin_core.engine.generation import FlushPolicy, Generation
from griffin_core.engine.memory import SessionMemory
from griffin_core.engine.reservation import Reservation
from griffin_core.engine.scoring import Scoring, choice_bytes
from griffin_core.engine.session import Session
from griffin_core.engine.task import GenerateTask, PruningParams, ScoreTask
from griffin_core.engine.turn import TurnPlan
from griffin_core.errors import InvalidRequest
from griffin_core.experts.correction import CorrectionParams
from griffin_core.experts.selection import Selection
from griffin_core.forward.correction import correction_bytes
from griffin_core.model.load import Model
from griffin_core.slim.views import SlimViews
from griffin_core.spec.choices import DEFAULT_RANK, Sharing, SpeculationMode


class TurnPlanner:
    """Plans the turns of an engine's sessions. Changes neither a session nor the engine.

    Args:
        selection, sharing, speculation, agreement_floor: for requests that set none.
        flush_policy: when generations emit their tokens.
        batch_invariant: see ``Engine``; no request may speculate then, since a draft changes the
            number of rows, nor be checked, since checks come by time.
    """

    def __init__(
        self,
        model: Model,
        *,
        selection: Selection,
        sharing: Sharing,
        speculation: SpeculationMode,
        agreement_floor: float | None,
        memory: SessionMemory,
        views: SlimViews,
        groups: ExpertGroups,
        flush_policy: FlushPolicy,
        batch_invariant: bool,
    ) -> None:
        self._model = model
        self._selection = selection
        self._sharing: Sharing = sharing
        self._speculation: SpeculationMode = speculation
        self._agreement_floor = agreement_floor
        self._memory = memory
        self._views = views
        self._groups = groups
        self._flush_policy = flush_policy
        self._batch_invariant = batch_invariant

    def plan(self, session: Session, task: GenerateTask | ScoreTask) -> TurnPlan:
        """The turn that a task is for a session, new or kept.

        Raises:
            InvalidRequest: the task does not fit the session or the model.
        """
        if isinstance(task, ScoreTask):
            return self._plan_score(session, task)
        return self._plan_generation(session, task)

    def _plan_generation(self, session: Session, task: GenerateTask) -> TurnPlan:
        spec = self._model.decoder.spec
        later_turn = bool(session.tokens)
        base = session.asked if later_turn else self._selection
        rank = self._selection.correction.rank or DEFAULT_RANK
        selection = asked = task.pruning.selection(base, task.sampling.seed, rank)
        checks = session.checks if later_turn else False
        if task.pruning.checks is not None:
            checks = task.pruning.checks
        control = self._control(session, task.pruning)
        if control is not None:
            warmup = (
                WARMUP_TOKENS if task.pruning.warmup_tokens is None else selection.warmup_tokens
            )
            selection = replace(selection, density=control.density, warmup_tokens=warmup)
        speculation = task.speculation.over(self._speculation)
        if self._batch_invariant and speculation.mode != "off":
            allowed = "off on a server with --batch-invariant"
            raise InvalidRequest("speculation", str(speculation.mode), allowed)
        if self._batch_invariant and control is not None:
            allowed = "none on a server with --batch-invariant: checks come by time"
            raise InvalidRequest("pruning.agreement_floor", control.floor, allowed)
        if self._batch_invariant and checks:
            allowed = "false on a server with --batch-invariant: they come by time"
            raise InvalidRequest("pruning.checks", True, allowed)
        if speculation.lossless and not speculation.drafts_by("slim"):
            selection = replace(selection, density=1.0)  # no token ever runs on experts
        self._check(selection)
        turn = Generation(self._model, task, self._flush_policy, speculation)
        length = len(session.tokens) + len(task.prefilled)
        cached = session.cache.length if session.cache else 0
        if length >= spec.context_length:
            raise InvalidRequest(
                "session_id",
                f"{length} tokens with the turns before",
                f"at most {spec.context_length - 1}, one less than the context length",
            )
        capacity = min(length + task.stopping.max_tokens, spec.context_length)
        sharing = task.pruning.sharing or (session.sharing if later_turn else self._sharing)
        kv = self._memory.max_bytes(capacity, resized=later_turn or task.keep)
        fits_idle = self._memory.kept_bytes(capacity) <= self._memory.budget.idle_limit
        return TurnPlan(
            turn_id=task.turn_id,
            arrived=task.arrived,
            prompt=task.prefilled,
            capacity=capacity,
            selection=selection,
            asked=asked,
            sharing=sharing,
            turn=turn,
            checks=checks,
            control=control,
            keep=task.keep and fits_idle,
            deadline=task.deadline,
            needs=self._needs(
                session,
                kv,
                selection,
                sharing,
                max(length - cached, selection.warmup_tokens),
                densities=DENSITIES if control is not None else (),
            ),
        )

    def _plan_score(self, session: Session, task: ScoreTask) -> TurnPlan:
        decoder = self._model.decoder
        selection = replace(task.pruning.selection(self._selection, task.seed), warmup_tokens=0)
        self._check(selection)
        if task.mode == "classification" and selection.correction.kind == "residual":
            # Each choice would fit its own, for one token.
            selection = replace(selection, correction=CorrectionParams(kind="bias"))
        turn = Scoring(decoder, task, selection)
        capacity = task.run_tokens
        sharing = task.pruning.sharing or self._sharing
        kv = self._memory.max_bytes(capacity, resized=False)
        if turn.chooses:
            needs = Reservation(
                kv=kv,
                zeroed=choice_bytes(decoder),
                correction=correction_bytes(decoder, selection, capacity),
            )
        else:
            needs = self._needs(session, kv, selection, sharing, len(task.prefilled))
        return TurnPlan(
            turn_id=task.turn_id,
            arrived=task.arrived,
            prompt=task.prefilled,
            capacity=capacity,
            selection=selection,
            asked=selection,
            sharing=sharing,
            turn=turn,
            keep=False,
            deadline=task.deadline,
            needs=needs,
        )

    def _control(self, session: Session, pruning: PruningParams) -> DensityControl | None:
        """What sets the density: the request's floor. A request that names neither floor nor
        density has the floor of the session's last turn, or of the engine."""
        floor = pruning.agreement_floor
        if floor is None and pruning.density is None:
            before = session.control
            floor = self._agreement_floor
            if session.tokens:
                floor = None if before is None else before.floor
        return None if floor is None else DensityControl(floor)

    def _check(self, selection: Selection) -> None:
        """Raises InvalidRequest if this engine cannot choose or run these experts."""
        selection.check(self._model.decoder.calibration)
        most, rank = self._views.max_rank, selection.correction.rank
        if most is not None and rank > most:
            allowed = f"up to {most}, the server's --correction-rank" if most else "none or bias"
            raise InvalidRequest("pruning.correction_rank", rank, allowed)

    def _needs(
        self,
        session: Session,
        kv: int,
        selection: Selection,
        sharing: Sharing,
        tokens: int,
        densities: Sequence[float] = (),
    ) -> Reservation:
        """The most bytes that a turn comes to hold, at its density or at any of several."""
        spec = self._model.decoder.spec
        counts = selection.most_counts(len(spec.layers), spec.intermediate_size)
        prunes = min(counts) < spec.intermediate_size
        return Reservation(
            kv=kv,
            zeroed=self._views.zeroed_bytes(counts),
            correction=correction_bytes(self._model.decoder, selection, tokens) if prunes else 0,
            view=self._views.planned_bytes(counts),
            pool=self._groups.pool(selection, sharing, session.shares_with, densities),
        )
