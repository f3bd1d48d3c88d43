"""The parts of an engine, put together."""

from __future__ import annotations

from dataclasses import dataclass

from griffin_core.engine.admission import Admission
from griffin_core.engine.commands import CommandQueue
from griffin_core.engine.dense_passes import DensePasses
from griffin_core.engine.expert_groups import ExpertGroups
from griffin_core.engine.generation import FlushPolicy
from griffin_core.engine.limits import Limits
from griffin_core.engine.memory import SessionMemory
from griffin_core.engine.ports import Observer, PrefillSource
from griffin_core.engine.prefill_queue import PrefillQueue
from griffin_core.engine.sampler_slots import SamplerSlots
from griffin_core.engine.score_steps import ScoreSteps
from griffin_core.engine.session_prefills import SessionPrefills
from griffin_core.engine.sessions import Sessions
from griffin_core.engine.speculative_steps import SpeculativeSteps
from griffin_core.engine.step_setup import StepSetup
from griffin_core.engine.token_steps import TokenSteps
from griffin_core.engine.turn_planner import TurnPlanner
from griffin_core.experts.selection import Selection
from griffin_core.model.decoder import Decoder
from griffin_core.model.load import Model
from griffin_core.sampling.sampler import Sampler
from griffin_core.slim.base import SlimForm
from griffin_core.slim.costs import StepCosts
from griffin_core.slim.views import SlimViews
from griffin_core.spec.choices import Sharing, SpeculationMode


@dataclass(frozen=True, kw_only=True)
class EngineParts:
    """What the loop, the commands and snapshots work on. Owned by the engine's thread."""

    decoder: Decoder
    limits: Limits
    observer: Observer
    setup: StepSetup
    sampler: Sampler
    slots: SamplerSlots
    memory: SessionMemory
    views: SlimViews
    groups: ExpertGroups
    flush_policy: FlushPolicy
    prefill_queue: PrefillQueue
    session_prefills: SessionPrefills
    sessions: Sessions
    admission: Admission
    token_steps: TokenSteps
    dense_passes: DensePasses
    score_steps: ScoreSteps


def build_parts(
    model: Model,
    commands: CommandQueue,
    *,
    limits: Limits,
    selection: Selection,
    sharing: Sharing,
    speculation: SpeculationMode,
    agreement_floor: float | None,
    slim: SlimForm | None,
    costs: StepCosts,
    batch_invariant: bool,
    share_across_owners: bool,
    cuda_graphs: bool,
    overlap: bool,
    stream_interval: int | None,
    prefill_source: PrefillSource | None,
    local_prefill_max_tokens: int | None,
    observer: Observer,
) -> EngineParts:
    """The parts of an engine with these options, which are those of ``Engine``. The device's memory
    is not taken yet.

    Args:
        commands: brings the prefill source's events to the engine's thread.
    """
    decoder = model.decoder
    sampler = Sampler(
        slots=limits.max_sessions, vocab_size=decoder.spec.vocab_size, backend=decoder.backend
    )
    slots = SamplerSlots(sampler, limits.max_sessions)
    flush_policy = FlushPolicy(stream_interval)
    rank = 0 if limits.session_bytes == 0 else selection.correction.rank  # nothing decodes here
    setup = StepSetup(
        decoder,
        slim,
        max_sessions=limits.max_sessions,
        chunk_tokens=limits.chunk_tokens,
        graphs=cuda_graphs,
        batch_invariant=batch_invariant,
        rank=rank,
    )
    memory = SessionMemory(decoder, limits, tails=rank > 0)
    views = SlimViews(
        decoder,
        setup.table,
        setup.form,
        memory.budget,
        builds=setup.form is None or not batch_invariant,
    )
    groups = ExpertGroups(decoder, views, costs)
    prefill_queue = PrefillQueue(
        decoder,
        max_waiting=limits.max_queue,
        chunk_tokens=limits.chunk_tokens,
        observer=observer,
        alone=batch_invariant,
    )
    session_prefills = SessionPrefills(
        decoder,
        prefill_queue,
        source=prefill_source,
        local_max_tokens=local_prefill_max_tokens,
        commands=commands,
    )
    sessions = Sessions(
        limits, memory=memory, prefills=session_prefills, groups=groups, slots=slots
    )
    planner = TurnPlanner(
        model,
        selection=selection,
        sharing=sharing,
        speculation=speculation,
        agreement_floor=agreement_floor,
        memory=memory,
        views=views,
        groups=groups,
        flush_policy=flush_policy,
        batch_invariant=batch_invariant,
    )
    admission = Admission(
        decoder,
        sessions,
        planner=planner,
        memory=memory,
        prefills=session_prefills,
        slots=slots,
        observer=observer,
        share_across_owners=share_across_owners,
    )
    dense_passes = DensePasses(decoder, sampler, sessions, session_prefills, observer)
    token_steps = TokenSteps(
        decoder,
        sampler,
        sessions,
        admission,
        dense_passes,
        SpeculativeSteps(decoder, sampler, groups, observer),
        overlap=overlap,
        batch_invariant=batch_invariant,
    )
    return EngineParts(
        decoder=decoder,
        limits=limits,
        observer=observer,
        setup=setup,
        sampler=sampler,
        slots=slots,
        memory=memory,
        views=views,
        groups=groups,
        flush_policy=flush_policy,
        prefill_queue=prefill_queue,
        session_prefills=session_prefills,
        sessions=sessions,
        admission=admission,
        token_steps=token_steps,
        dense_passes=dense_passes,
        score_steps=ScoreSteps(decoder, sessions, views, batch_invariant=batch_invariant),
    )
