"""The engine: one thread that owns the model, the sessions and the device.

It serves both phases. Prefills run a chunk at a time, all sessions together a token at a time, in
turns, so that neither starves the other. Commands come in from any thread by a queue; results go
out through sinks. It knows nothing of sockets, protocols or event loops.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from functools import partial
from typing import TypeVar

import torch

from griffin_core.engine.cpu_share import INTERVAL_S, CpuShare
from griffin_core.engine.device_memory import (
    DeviceShare,
    budget_from_cpu,
    fraction_of,
    graph_bytes,
    said_size,
    tokens_held,
)
from griffin_core.engine.events import Event, Failed, Sink
from griffin_core.engine.loop import Decoding
from griffin_core.engine.observer import Observer
from griffin_core.engine.prefill_queue import (
    PrefillQueue,
    PrefillRun,
    PrefillStreamEvent,
    PrefillTask,
)
from griffin_core.engine.scheduler import Limits
from griffin_core.engine.sessions import Holdings, SessionInfo, SessionPage, Sharing
from griffin_core.engine.snapshot import EngineSnapshot
from griffin_core.engine.task import GenerateTask, ScoreTask
from griffin_core.errors import (
    DeviceMemoryExhausted,
    EngineStopped,
    GriffinError,
    InvalidRequest,
)
from griffin_core.experts.selection import Selection
from griffin_core.forward.decode import EagerStep, Stepper
from griffin_core.forward.invariant import InvariantStep
from griffin_core.forward.prefill import PrefillEvent, Prompt, launch
from griffin_core.kv.pool import KvPool
from griffin_core.model.decoder import Decoder
from griffin_core.model.load import Model
from griffin_core.slim.base import SlimForm, SlimTable
from griffin_core.slim.blocks import BlockTable
from griffin_core.slim.costs import ASSUMED_COSTS, EVEN_COSTS, StepCosts, measure_costs
from griffin_core.slim.packed import Packed

log = logging.getLogger(__name__)

T = TypeVar("T")

_STOPPING = "the server is shutting down"


class Engine:
    """Runs sessions and prefills for one model. All public methods may be called from any thread.

    Args:
        model: what to run.
        limits: what it may hold.
        selection, sharing: of requests that name none.
        slim: how sessions run on their experts; None for what the device does best.
        costs: what a step costs by how its FF runs, see ``slim.costs``; None measures it at start.
        batch_invariant: what a session makes that runs on its own experts, or on all neurons, does
            not depend, to the bit, on what else the engine does, whatever the dtype: products of
            equally many rows (``decode.apart``), one prompt a pass, a fixed number of threads, and
            no copies of experts, so ``auto`` sessions run dense.
        cuda_graphs: on a GPU, run a step, and a pass over one short prompt, as one graph, captured
            at start.
        overlap: launch a step before the tokens of the one before are read; None for where it
            pays, which is on a GPU.
        stream_interval: a session's tokens come out so many at a time, but for the first; None for
            more the more sessions there are. See ``generation.Pace``.
        own_prefill_tokens: prompts of new sessions up to this many tokens it runs itself, for
            longer ones it asks its caller; None for all.
        threads: of the engine's thread on a CPU: a number, or a share of the CPUs that follows the
            load of the machine; None for torch's default. No other thread of the process should
            multiply matrices: OpenMP gives each its own workers, and as soon as there are more of
            them than CPUs, all wait for one another by sleeping (docs/LOG.md).
        observer: is told what is done.
    """

    def __init__(
        self,
        model: Model,
        *,
        limits: Limits | None = None,
        selection: Selection | None = None,
        sharing: Sharing = "auto",
        slim: SlimForm | None = None,
        costs: StepCosts | None = ASSUMED_COSTS,
        batch_invariant: bool = False,
        cuda_graphs: bool = True,
        overlap: bool | None = None,
        stream_interval: int | None = None,
        own_prefill_tokens: int | None = None,
        threads: int | CpuShare | None = None,
        observer: Observer | None = None,
    ) -> None:
        self.model = model
        self.limits = limits or Limits()
        self.selection = selection or Selection(density=1.0)
        self.sharing: Sharing = sharing
        self._slim = slim or (None if model.decoder.backend.captures else Packed())
        self._slims = _slim_table(model.decoder, self._slim, self.limits.max_sessions)
        self._measures_costs = costs is None and not batch_invariant
        self.batch_invariant = batch_invariant
        backend = model.decoder.backend
        observer = observer or Observer()
        self._prefills = PrefillQueue(
            model.decoder,
            max_waiting=self.limits.max_queue,
            chunk_tokens=self.limits.chunk_tokens,
            observer=observer,
            alone=batch_invariant,
        )
        self._decoding = Decoding(
            model,
            limits=self.limits,
            selection=self.selection,
            sharing=sharing,
            slims=self._slims,
            slim=self._slim,
            costs=EVEN_COSTS if batch_invariant else costs or ASSUMED_COSTS,
            batch_invariant=batch_invariant,
            overlap=backend.overlaps if overlap is None else overlap,
            prefills=self._prefills,
            observer=observer,
            stream_interval=stream_interval,
            own_prefill_tokens=own_prefill_tokens,
        )
        self._threads = threads
        self._share: DeviceShare | None = None  # of a GPU's memory
        self._cuda_graphs = cuda_graphs
        self._owed_s = 0.0  # what decoding is to get before the next chunk of a prefill
        self._commands: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self.ended: Future[None] = Future()
        """Done when the thread has ended; with its exception if a bug ended it."""
        self.ready: Future[None] = Future()
        """Done when what takes its time at start is over: graphs, measurements."""
        self._stopping = False
        self._stop_lock = threading.Lock()  # so that no command slips in behind the last one
        self._thread = threading.Thread(target=self._run, name="griffin-engine", daemon=True)

    # -- from any thread -------------------------------------------------------------------------

    def start(self) -> None:
        """Starts the thread."""
        self._thread.start()

    def stop(self) -> None:
        """Ends everything that is running with EngineStopped, and the thread."""
        with self._stop_lock:
            self._stopping = True
            self._commands.put(lambda: None)
        if threading.current_thread() is not self._thread:  # garbage is collected on any thread
            self._thread.join()

    def submit(self, task: GenerateTask | ScoreTask, sink: Sink[Event]) -> str:
        """Queues a task; what becomes of it goes to ``sink``, ending in Finished, Scored or Failed.

        On ``Admitted`` with a handoff, the caller has the prompt prefilled and passes the events to
        ``intake``. Whoever submits also calls ``cancel`` if it stops listening.

        Returns:
            The turn's id, for ``intake``, ``fail`` and ``cancel``. All three are without effect
            once the turn is over.
        """
        self._post(partial(self._decoding.submit, task, sink), partial(_refuse, sink))
        return task.turn_id

    def intake(self, turn_id: str, event: PrefillEvent) -> None:
        """Hands a turn an event of its prefill."""
        self._post(partial(self._decoding.intake, turn_id, event))

    def fail(self, turn_id: str, error: Exception) -> None:
        """Ends a turn, and its session with it, with an error."""
        self._post(partial(self._decoding.fail, turn_id, error))

    def cancel(self, turn_id: str) -> None:
        """Ends a turn whose caller has gone, and its session with it."""
        self._decoding.stop_prefill(turn_id)
        self._post(partial(self._decoding.cancel, turn_id))

    def close(self, session_id: str) -> Future[None]:
        """Frees a session in any state. The future raises SessionNotFound if there is none."""
        return self._ask(partial(self._decoding.close, session_id))

    def session(self, session_id: str) -> Future[SessionInfo]:
        """One session. The future raises SessionNotFound if there is none."""
        return self._ask(partial(self._decoding.info, session_id))

    def sessions(self) -> Future[list[SessionInfo]]:
        """All sessions, oldest first. Decoding stands still meanwhile; see ``session_page``."""
        return self._ask(self._decoding.infos)

    def session_page(self, *, after: int = 0, most: int) -> Future[SessionPage]:
        """Up to ``most`` sessions, oldest first.

        Args:
            after: ``last`` of the page before; 0 for the first page.
        """
        return self._ask(partial(self._decoding.page, after, most))

    def holdings(self) -> Future[Holdings]:
        """What is held now, by how many."""
        return self._ask(self._decoding.holdings)

    def snapshot(self, *, contents: bool = False) -> Future[EngineSnapshot]:
        """Everything that is held, at one moment between two steps, for diagnosis. Decoding stands
        still meanwhile, longer the more sessions there are; on a GPU it waits for the device.

        Args:
            contents: whether to include each session's tokens and a copy of its statistic.

        Returns:
            A future that raises EngineStopped if the engine has stopped.
        """
        return self._ask(partial(self._decoding.snapshot, contents=contents))

    def prefill(self, task: PrefillTask, sink: Sink[PrefillStreamEvent]) -> PrefillRun:
        """Queues a prefill that no session of this engine is for. Events go to ``sink`` up to
        PrefillFinished or Failed."""
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
            most_begun=task.most_begun,
        )
        scheduler = self._decoding.scheduler
        self._post(lambda: self._prefills.add(run, scheduler.retry_after_s), partial(_refuse, sink))
        return run

    def wake(self) -> None:
        """Makes the engine look again: a sink is ready, or a flag was set."""
        self._commands.put(lambda: None)

    @property
    def threads(self) -> int:
        """CPU threads that the model runs on now."""
        if isinstance(self._threads, CpuShare):
            return self._threads.threads
        return self._threads or torch.get_num_threads()

    @property
    def session_bytes(self) -> int:
        """What KV caches and slim views may hold; 0 until the engine is ready."""
        return self._decoding.budget.limit

    @property
    def held_bytes(self) -> int:
        """What KV caches and slim views of all sessions hold now."""
        return self._decoding.budget.held

    @property
    def peak_bytes(self) -> int:
        """The most they ever held."""
        return self._decoding.budget.peak

    def _post(
        self,
        command: Callable[[], None],
        refused: Callable[[Exception], None] = lambda _: None,
    ) -> None:
        with self._stop_lock:
            if not self._stopping:
                self._commands.put(command)
                return
        refused(EngineStopped(_STOPPING))

    def _ask(self, question: Callable[[], T]) -> Future[T]:
        future: Future[T] = Future()

        def answer() -> None:
            if not future.set_running_or_notify_cancel():  # whoever asked has gone
                return
            try:
                future.set_result(question())
            except Exception as error:
                future.set_exception(error)

        self._post(answer, future.set_exception)
        return future

    # -- in the engine's thread ------------------------------------------------------------------

    def _run(self) -> None:
        fault: Exception | None = None
        with torch.inference_mode():
            try:
                if self._threads is not None:
                    torch.set_num_threads(self.threads)
                self._follow_load()  # so that the first turn knows what there was beside the start
                self.model.decoder.backend.prepare_thread()
                measure = self._prepare(self._new_pool())
                if self._measures_costs:
                    self._decoding.costs(measure())
                self.ready.set_result(None)
                while not self._stopping:
                    self._turn()
            except Exception as error:  # a bug must not leave callers waiting
                if self.ready.done() or not isinstance(error, GriffinError):
                    log.exception("the engine's thread ends")
                fault = error
            with self._stop_lock:
                self._stopping = True
            self._take_commands(wait=False)
            self._decoding.end(EngineStopped(_STOPPING))
            self._prefills.end(EngineStopped(_STOPPING))
        self._decoding.release()
        self._prefills.launch = launch
        if self._share is not None:
            self._share.release()
        if not self.ready.done():
            self.ready.set_exception(fault or EngineStopped(_STOPPING))
        if fault is None:
            self.ended.set_result(None)
        else:
            self.ended.set_exception(fault)

    def _prepare(self, pool: KvPool) -> Callable[[], StepCosts]:
        """As ``_prepare_step``; a device that is full is reported in a sentence."""
        try:
            return self._prepare_step(pool)
        except torch.OutOfMemoryError as error:
            device = self.model.decoder.device
            free, _ = torch.cuda.mem_get_info(device)
            raise DeviceMemoryExhausted(
                f"the steps' graphs do not fit {device}: {said_size(free)} are free beside the "
                "weights and the sessions' memory"
            ) from error

    def _prepare_step(self, pool: KvPool) -> Callable[[], StepCosts]:
        """Sets what runs a step, and returns what measures its costs."""
        decoder, sampler = self.model.decoder, self._decoding.sampler
        if self._slim is None:
            from griffin_core.forward.graphs import GraphStep  # noqa: PLC0415  # needs triton
            from griffin_core.slim.indexed import IndexTable  # noqa: PLC0415

            if self._cuda_graphs:
                from griffin_core.forward.prompt_graphs import PromptGraphs  # noqa: PLC0415

                self._prefills.launch = PromptGraphs(
                    decoder, pool, most_tokens=self.limits.chunk_tokens, progress=self._note_start
                ).launch
            assert isinstance(self._slims, IndexTable)
            step = GraphStep(
                decoder=decoder,
                pool=pool,
                sampler=sampler,
                slims=self._slims,
                max_sequences=self.limits.max_sessions,
                graphs=self._cuda_graphs,
                apart=self.batch_invariant,
                progress=self._note_start,
            )
            self._decoding.open(pool, step)
            self._check_invariance(step.rows_stay_apart)
            return step.measure_costs
        assert isinstance(self._slims, BlockTable)
        stepper: Stepper
        if self.batch_invariant:
            stepper = apart = InvariantStep(
                decoder=decoder, pool=pool, sampler=sampler, slims=self._slims
            )
            self._check_invariance(apart.rows_stay_apart)
        else:
            stepper = EagerStep(decoder=decoder, pool=pool, sampler=sampler, slims=self._slims)
        self._decoding.open(pool, stepper)
        return partial(measure_costs, decoder, self._slim)

    def _check_invariance(self, holds: Callable[[], bool]) -> None:
        if self.batch_invariant and not holds():
            decoder = self.model.decoder
            raise InvalidRequest(
                "batch_invariant",
                f"true with {decoder.dtype} on this {decoder.device.type}",
                "false: its products of equally many rows depend on a row's place",
            )

    def _new_pool(self) -> KvPool:
        """Sets what sessions may hold, as the limits say or from what the device has left, and
        takes the memory of their keys and values.

        Raises:
            DeviceMemoryExhausted: there is too little.
        """
        limits, decoder, budget = self.limits, self.model.decoder, self._decoding.budget
        size = limits.session_bytes
        if size == 0:
            return decoder.new_pool(0)
        fraction = fraction_of(decoder.device, limits.memory_fraction)
        if decoder.backend.claims_memory:
            share = DeviceShare(decoder, limits.chunk_tokens)
            size = share.claim(fraction, size, graph_bytes(decoder, limits.max_sessions))
            self._share = share
        elif size is None:
            size = budget_from_cpu(decoder, fraction, limits.chunk_tokens)
        budget.limit, budget.idle_limit = size, limits.idle_bytes_of(size)
        tokens = tokens_held(decoder, size)
        log.info("session memory %s: %s tokens of KV", said_size(size), f"{tokens:,}")
        if tokens < decoder.spec.context_length:
            log.warning(
                "session memory holds %s tokens of KV, less than one session of the full context "
                "of %s: longer requests are refused",
                f"{tokens:,}",
                f"{decoder.spec.context_length:,}",
            )
        pool = decoder.new_pool(tokens)
        if self._share is not None:
            self._share.allocated(size)
        return pool

    def _note_start(self, message: str) -> None:
        if self._stopping:
            raise EngineStopped(_STOPPING)
        log.info(message)

    def _turn(self) -> None:
        """A chunk of one prefill if it is due, a token of every session, and what has become due
        meanwhile."""
        decoding = self._decoding
        self._follow_load()
        decoding.tick()
        self._take_commands(wait=not (self._prefills.has_work or decoding.has_work))
        if self._owed_s <= 0 or not decoding.has_work:
            if self._prefills.has_work:
                decoding.flush()
            clock = time.monotonic()
            self._prefills.turn()
            if decoding.has_work:
                self.model.decoder.backend.synchronize()  # else the step is charged with the chunk
            share = self.limits.prefill_share
            self._owed_s = (time.monotonic() - clock) * (1 - share) / share
            self._take_commands(wait=False)
        clock = time.monotonic()
        decoding.step()
        self._owed_s -= time.monotonic() - clock

    def _follow_load(self) -> None:
        """Runs on more or fewer threads from here on, if the machine's load says so."""
        share = self._threads
        if self.model.decoder.backend.overlaps or not isinstance(share, CpuShare):
            return
        if self.batch_invariant:  # sums are divided among threads
            return
        if share.follow():
            log.debug("threads: %d", share.threads)
            torch.set_num_threads(share.threads)

    def _take_commands(self, *, wait: bool) -> None:
        try:
            if wait:
                clock = time.monotonic()
                command = self._commands.get(timeout=self._decoding.next_due_s())
                if isinstance(self._threads, CpuShare) and time.monotonic() - clock > INTERVAL_S:
                    self._threads.forget()
                self._run_command(command)
            while True:
                self._run_command(self._commands.get_nowait())
        except queue.Empty:
            return

    def _run_command(self, command: Callable[[], None]) -> None:
        try:
            command()
        except Exception:  # a bug, and one caller's; the others go on
            log.exception("command failed")


def _slim_table(decoder: Decoder, form: SlimForm | None, sessions: int) -> SlimTable:
    if form is not None:
        return BlockTable(decoder)
    from griffin_core.slim.indexed import IndexTable  # noqa: PLC0415  # needs triton

    # A score may run on a set beside that of its session.
    return IndexTable(decoder, sets=2 * sessions)


def _refuse(sink: Sink[Failed], error: Exception) -> None:
    sink.put(Failed(error=error))
