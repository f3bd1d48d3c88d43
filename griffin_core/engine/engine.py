"""The engine: one thread that owns the model, the sessions and the device.

It serves both phases. Passes over prompts and steps of all sessions take turns, so that neither
starves the other. Commands come in from any thread by a queue; results go out through sinks. It
knows nothing of sockets, protocols or event loops.
"""

from __future__ import annotations

import logging
import threading
import warnings
from concurrent.futures import Future
from functools import partial
from typing import Any

import torch

from griffin_core.engine.commands import (
    Arrivals,
    Ask,
    Cancel,
    CloseSession,
    CommandQueue,
    GetSession,
    GetSessionPage,
    GetUsage,
    ListSessions,
    Prefill,
    Question,
    Submit,
    TakeSnapshot,
    Wake,
)
from griffin_core.engine.cpu_share import CpuShare
from griffin_core.engine.events import Event, Failed, PrefillStreamEvent
from griffin_core.engine.limits import Limits
from griffin_core.engine.loop import EngineLoop
from griffin_core.engine.model_threads import ModelThreads
from griffin_core.engine.parts import build_parts
from griffin_core.engine.ports import Observer, PrefillSource, Sink
from griffin_core.engine.prefill_run import PrefillRun
from griffin_core.engine.session import SessionInfo, SessionPage, Usage
from griffin_core.engine.snapshot import EngineSnapshot
from griffin_core.engine.task import GenerateTask, PrefillTask, ScoreTask
from griffin_core.engine.turn_clock import TurnClock
from griffin_core.errors import EngineStopped, GriffinError
from griffin_core.experts.selection import Selection
from griffin_core.forward.prompt import (
    Prompt,
)
from griffin_core.model.load import Model
from griffin_core.slim.base import SlimForm
from griffin_core.slim.costs import ASSUMED_COSTS, EVEN_COSTS, StepCosts
from griffin_core.spec.choices import Sharing, SpeculationMode

log = logging.getLogger(__name__)

_STOPPING = "the server is shutting down"


class Engine:
    """Runs sessions and prefills for one model. All public methods may be called from any thread.

    Args:
        model: what to run.
        limits: what the engine may hold.
        selection, sharing, speculation, agreement_floor: defaults for requests that set none. A
            floor takes the place of the selection's density.
        slim: how sessions run on their experts; None for what suits the device best.
        costs: what a step costs by how its FF runs, see ``slim.costs``; None to measure it at
            start.
        batch_invariant: results of a session that runs on its own experts, or on all neurons, do
            not depend, to the bit, on what else the engine does, whatever the dtype. For this every
            product has the same number of rows (``forward.invariant``), each pass reads one prompt,
            the number of threads is fixed, and no experts are copied, so ``auto`` sessions run
            dense.
        cuda_graphs: on a GPU, capture graphs at start and run a step, or a pass over one short
            prompt, as one graph.
        overlap: launch a step before the tokens of the one before are read; None for where that
            pays, which is on a GPU.
        stream_interval: number of tokens that a session emits together, after its first; None for
            more tokens the more sessions there are. See ``generation.FlushPolicy``.
        prefill_source: reads the prompts that the engine does not read itself; None if the engine
            reads all prompts.
        local_prefill_max_tokens: with a prefill source, the engine still reads prompts of new
            sessions up to this many tokens itself; None for all prompts.
        threads: CPU threads of the engine's thread: a number, or a share of the CPUs that follows
            the load of the machine; None for torch's default. No other thread of the process should
            multiply matrices: OpenMP gives each its own workers, and as soon as there are more
            workers than CPUs, all of them wait for one another by sleeping (docs/LOG.md).
        observer: is told about the engine's work.
        own_prefill_tokens: the old name of ``local_prefill_max_tokens``; to be removed in the next
            release.
    """

    def __init__(
        self,
        model: Model,
        *,
        limits: Limits | None = None,
        selection: Selection | None = None,
        sharing: Sharing = "auto",
        speculation: SpeculationMode = "off",
        agreement_floor: float | None = None,
        slim: SlimForm | None = None,
        costs: StepCosts | None = ASSUMED_COSTS,
        batch_invariant: bool = False,
        share_across_owners: bool = False,
        cuda_graphs: bool = True,
        overlap: bool | None = None,
        stream_interval: int | None = None,
        prefill_source: PrefillSource | None = None,
        local_prefill_max_tokens: int | None = None,
        threads: int | CpuShare | None = None,
        observer: Observer | None = None,
        own_prefill_tokens: int | None = None,
    ) -> None:
        if own_prefill_tokens is not None:
            warnings.warn(
                "own_prefill_tokens is now local_prefill_max_tokens",
                DeprecationWarning,
                stacklevel=2,
            )
            local_prefill_max_tokens = own_prefill_tokens
        backend = model.decoder.backend
        self.model = model
        self.limits = limits or Limits()
        self.selection = selection or Selection(density=1.0)
        self.sharing: Sharing = sharing
        self.speculation: SpeculationMode = speculation
        self.agreement_floor = agreement_floor
        self.batch_invariant = batch_invariant
        self.ended: Future[None] = Future()
        """Done when the thread has ended; with its exception if a bug ended it."""
        self.ready: Future[None] = Future()
        """Done when the slow parts of the start are over: graphs, measurements."""
        self._measures_costs = costs is None and not batch_invariant
        self._commands = CommandQueue()
        self.arrivals = Arrivals()
        """What prepares a request may announce it here."""
        # The sums of a product are divided among threads, and steps of a GPU hardly use the CPU.
        follows_load = not batch_invariant and not backend.overlaps
        self._threads = ModelThreads(threads, follows=follows_load)
        parts = build_parts(
            model,
            self._commands,
            limits=self.limits,
            selection=self.selection,
            sharing=sharing,
            speculation=speculation,
            agreement_floor=agreement_floor,
            slim=slim,
            costs=EVEN_COSTS if batch_invariant else costs or ASSUMED_COSTS,
            batch_invariant=batch_invariant,
            share_across_owners=share_across_owners,
            cuda_graphs=cuda_graphs,
            overlap=backend.overlaps if overlap is None else overlap,
            stream_interval=stream_interval,
            prefill_source=prefill_source,
            local_prefill_max_tokens=local_prefill_max_tokens,
            observer=observer or Observer(),
        )
        self._stop_prefill = parts.session_prefills.stop
        self._budget = parts.memory.budget
        self._clock = TurnClock()
        self._loop = EngineLoop(parts, self._commands, self.arrivals, self._threads, self._clock)
        self._thread = threading.Thread(target=self._run, name="griffin-engine", daemon=True)

    def start(self) -> None:
        """Starts the thread."""
        self._thread.start()

    def stop(self, timeout_s: float | None = None) -> bool:
        """Ends everything that is running with EngineStopped, and the thread.

        Args:
            timeout_s: seconds to wait for the thread; None waits without end.

        Returns:
            Whether the thread has ended. One that is stuck cannot be ended but with the process.
        """
        self._commands.stop()
        if threading.current_thread() is not self._thread:  # garbage is collected on any thread
            self._thread.join(timeout_s)
        return not self._thread.is_alive()

    def stuck(self, after_s: float) -> bool:
        """Whether the engine's thread seems to be stuck: what it does now has taken longer than
        ``after_s``, and than ten times the longest turn before. Never while the engine starts."""
        return self._clock.stuck(after_s)

    def submit(self, task: GenerateTask | ScoreTask, sink: Sink[Event]) -> str:
        """Queues a task. Its events go to ``sink``; the last one is Finished, Scored or Failed. A
        caller that stops listening calls ``cancel``.

        Returns:
            The turn's id, for ``cancel``.
        """
        if not self._commands.post(Submit(task, sink)):
            sink.put(Failed(error=EngineStopped(_STOPPING)))
        return task.turn_id

    def cancel(self, turn_id: str) -> None:
        """Ends a turn whose caller has gone, and its session with it. Without effect if the turn is
        over."""
        self._stop_prefill(turn_id)
        self._commands.post(Cancel(turn_id))

    def close(self, session_id: str, *, owner: str | None = None) -> Future[None]:
        """Frees a session in any state. The future raises SessionNotFound if there is none.

        Args:
            owner: whose it must be; None for anybody's.
        """
        return self._ask(CloseSession(session_id, owner))

    def session(self, session_id: str, *, owner: str | None = None) -> Future[SessionInfo]:
        """One session. The future raises SessionNotFound if there is none.

        Args:
            owner: whose it must be; None for anybody's.
        """
        return self._ask(GetSession(session_id, owner))

    def sessions(self) -> Future[list[SessionInfo]]:
        """All sessions, oldest first. Decoding stands still meanwhile; see ``session_page``."""
        return self._ask(ListSessions())

    def session_page(
        self, *, after: int = 0, most: int, owner: str | None = None
    ) -> Future[SessionPage]:
        """Up to ``most`` sessions, oldest first.

        Args:
            after: ``last`` of the page before; 0 for the first page.
            owner: whose sessions; None for everybody's.
        """
        return self._ask(GetSessionPage(after, most, owner))

    def usage(self) -> Future[Usage]:
        """How many sessions there are now, and what they hold."""
        return self._ask(GetUsage())

    def snapshot(self, *, contents: bool = False) -> Future[EngineSnapshot]:
        """Everything that is held, at one moment between two steps, for diagnosis. Decoding stands
        still meanwhile, longer the more sessions there are; on a GPU it waits for the device.

        Args:
            contents: whether to include each session's tokens and a copy of its statistic.

        Returns:
            A future that raises EngineStopped if the engine has stopped.
        """
        return self._ask(TakeSnapshot(contents))

    def prefill(self, task: PrefillTask, sink: Sink[PrefillStreamEvent]) -> PrefillRun:
        """Queues a prefill that is for no session of this engine. Its events go to ``sink``; the
        last one is PrefillFinished or Failed."""
        prompt = partial(
            Prompt,
            self.model.decoder,
            task.token_ids,
            task.selection,
            wants_kv=task.wants_kv,
            watch=task.watch,
        )
        run = PrefillRun(
            prompt,
            sink,
            tokens=len(task.token_ids),
            admitted=False,
            max_concurrent=task.max_concurrent,
            owner=task.owner,
        )
        if not self._commands.post(Prefill(run)):
            sink.put(Failed(error=EngineStopped(_STOPPING)))
        return run

    def wake(self) -> None:
        """Makes the engine look again: a sink is ready, or a flag was set."""
        self._commands.post(Wake())

    @property
    def threads(self) -> int:
        """CPU threads that the model runs on now."""
        return self._threads.count

    @property
    def session_bytes(self) -> int:
        """What KV caches and slim views may hold; 0 until the engine is ready."""
        return self._budget.limit

    @property
    def held_bytes(self) -> int:
        """What KV caches and slim views of all sessions hold now."""
        return self._budget.held

    @property
    def peak_bytes(self) -> int:
        """The most that they ever held."""
        return self._budget.peak

    def _ask(self, question: Question) -> Future[Any]:
        answer: Future[Any] = Future()
        if not self._commands.post(Ask(question, answer)):
            answer.set_exception(EngineStopped(_STOPPING))
        return answer

    def _run(self) -> None:
        """The thread."""
        fault: Exception | None = None
        with torch.inference_mode():
            try:
                self._loop.open(measure_costs=self._measures_costs)
                self.ready.set_result(None)
                while not self._commands.stopped:
                    self._loop.run_turn()
            except Exception as error:  # a bug must not leave callers waiting
                if self.ready.done() or not isinstance(error, GriffinError):
                    log.exception("the engine's thread ends")
                fault = error
            self._commands.stop()
            try:
                self._loop.end(EngineStopped(_STOPPING))
                self._loop.close()
            except Exception as error:  # nor may a lost device, which cannot free its memory
                log.exception("the engine could not free everything")
                fault = fault or error
        if not self.ready.done():
            self.ready.set_exception(fault or EngineStopped(_STOPPING))
        if fault is None:
            self.ended.set_result(None)
        else:
            self.ended.set_exception(fault)
