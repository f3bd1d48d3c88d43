"""The engine's loop: what runs next.

A turn of the loop runs a pass over prompts if one is due, then a step of all sessions. Between the
two it runs the commands that have come, so a cancel takes effect within one pass or one step.
"""

from __future__ import annotations

import logging
import time

from griffin_core.engine.commands import Arrivals, Command, CommandQueue
from griffin_core.engine.dispatch import run_command
from griffin_core.engine.model_threads import ModelThreads
from griffin_core.engine.parts import EngineParts
from griffin_core.engine.session import State
from griffin_core.engine.timeouts import check_readers, next_due_s
from griffin_core.engine.turn_clock import TurnClock
from griffin_core.errors import EngineStopped, ReaderTooSlow
from griffin_core.forward.decode import Stepper
from griffin_core.forward.prefill import launch

log = logging.getLogger(__name__)

BUILD_SHARE = 0.25
"""Slim views are built between two steps for about this share of a step's time, and at least one
layer. No session waits for a view: it runs zeroed or dense meanwhile."""


GATHER_S = 0.02
"""The longest that an idle engine waits for prompts that could be read together with the first, in
seconds. Sixteen calls that a client makes at once come within 6 to 12 ms."""

ANNOUNCED_S, CROWD_S = 0.005, 0.002
"""The longest that it waits for the next one of them: for one that was announced, and, after a
crowd, for one that was not. Calls that a client makes at once come 0.3 to 1.3 ms apart."""


class EngineLoop:
    """What an engine does in its thread: ``open``, then ``run_turn`` for as long as it is to work,
    then ``end`` and ``close``.

    Args:
        commands: what other threads ask for.
        arrivals: what is about to be submitted.
        threads: the CPU threads that the model runs on.
        clock: times the turns.
    """

    def __init__(
        self,
        parts: EngineParts,
        commands: CommandQueue,
        arrivals: Arrivals,
        threads: ModelThreads,
        clock: TurnClock,
    ) -> None:
        self.parts = parts
        self._clock = clock
        self._commands = commands
        self._arrivals = arrivals
        self._threads = threads
        self._stepper: Stepper | None = None  # until ``open``
        self._step_s = 0.0  # what the last step took
        self._owed_s = 0.0  # what decoding is to get before the next pass over prompts
        self._crowd = False  # whether others came with the last prompt that came to an idle engine

    def open(self, *, measure_costs: bool) -> None:
        """Takes the device's memory and prepares the steps.

        Args:
            measure_costs: whether to measure what steps cost.

        Raises:
            GriffinError: the engine cannot run on this device as it was configured.
        """
        parts = self.parts
        self._threads.start()
        parts.decoder.backend.prepare_thread()
        steps = parts.setup.prepare(parts.memory.open(), parts.sampler, self._note_start)
        self._stepper, parts.prefill_queue.launch = steps.stepper, steps.launch
        if measure_costs:
            parts.groups.set_costs(steps.measure_costs())

    def _note_start(self, message: str) -> None:
        if self._commands.stopped:
            raise EngineStopped("the server is shutting down")
        log.info(message)

    def end(self, error: Exception) -> None:
        """Runs the commands that have come, and fails everything that is running."""
        self._run_commands()
        self.parts.sessions.close_all(error)
        self.parts.prefill_queue.end(error)

    def close(self) -> None:
        """Frees the device's memory, once everything has ended."""
        self._stepper, self.parts.prefill_queue.launch = None, launch
        self.parts.memory.close()

    def run_turn(self) -> None:
        """Runs a pass over prompts if it is due, a step of all sessions, and what has become due
        meanwhile. Waits for a command if there is nothing to do."""
        with self._clock.turn():
            self._run_turn()

    def _run_turn(self) -> None:
        self._threads.follow()
        self.tick()
        queue = self.parts.prefill_queue
        added, idle = queue.added, not queue.has_work and not self.has_work
        if idle:
            self._wait_for_commands()
        else:
            self._run_commands()
        if self._owed_s <= 0 or not self.has_work:
            if not self.has_work:
                self._gather()
            self._run_pass()
            self._run_commands()
        if idle and queue.added > added:
            self._crowd = queue.added > added + 1
        clock = time.monotonic()
        self.step()
        self._owed_s -= time.monotonic() - clock

    def tick(self) -> None:
        """Does what has become due by time, and admits sessions."""
        sessions, timeout_s = self.parts.sessions, self.parts.limits.reader_timeout_s
        sessions.scheduler.expire()
        for session in check_readers(sessions.scheduler, timeout_s):
            message = f"session {session.session_id!r}: nobody has read for {timeout_s:g} s"
            sessions.fail(session, ReaderTooSlow(message))
        self.parts.admission.admit()

    @property
    def has_work(self) -> bool:
        """Whether ``step`` would do something."""
        parts = self.parts
        return parts.groups.due or parts.token_steps.has_work or parts.score_steps.has_work

    def step(self) -> None:
        """Runs a step: a token for every session whose reader keeps up."""
        clock = time.monotonic()
        parts, stepper = self.parts, self._stepper
        assert stepper is not None, "no step runs before there is memory"
        parts.views.build(BUILD_SHARE * self._step_s)
        for session, error in parts.groups.advance():
            parts.sessions.fail_with(session, error)
        read = parts.token_steps.run(stepper, self._set_flush_policy, parts.score_steps.join)
        parts.score_steps.run(stepper)
        self._step_s = time.monotonic() - clock
        if read:
            parts.dense_passes.note_step(self._step_s)
            parts.observer.stepped(self._step_s, read)

    def _set_flush_policy(self, streams: int) -> None:
        prompts = self.parts.prefill_queue.has_work
        self.parts.flush_policy.set(streams=streams, prompts=prompts)

    def _run_pass(self) -> None:
        """Runs a pass over prompts, if any wait, and notes what decoding is to get for it."""
        queue = self.parts.prefill_queue
        if queue.has_work:
            self._flush()
        clock = time.monotonic()
        queue.run_pass()
        if self.has_work:
            self.parts.decoder.backend.synchronize()  # otherwise the step is charged with the pass
        share = self.parts.limits.prefill_share
        self._owed_s = (time.monotonic() - clock) * (1 - share) / share

    def _flush(self) -> None:
        """Reads and emits all tokens that there are: something that takes long comes next."""
        clock = time.monotonic()
        if read := self.parts.token_steps.read_all():
            self.parts.observer.stepped(self._step_s + time.monotonic() - clock, read)
        for session in self.parts.sessions.scheduler.live:
            if session.state is State.DECODE:
                session.turn.flush(session)

    def _wait_for_commands(self) -> None:
        """Waits until a command comes or something becomes due, and runs the commands."""
        clock = time.monotonic()
        due_s = next_due_s(self.parts.sessions.scheduler, self.parts.limits.reader_timeout_s)
        with self._clock.waiting():
            first = self._commands.take(due_s)
        self._threads.note_idle(time.monotonic() - clock)
        if first is not None:
            self._run_commands(first)

    def _gather(self) -> None:
        """Waits a moment for requests that are about to come, while the next pass has room for
        their prompts: one that came a millisecond later would wait for all of the pass. Requests
        are about to come if they were announced, and after a crowd: a client that has made many
        calls at once is likely to do so again, and one that makes a call at a time is not kept.
        """
        queue, until = self.parts.prefill_queue, time.monotonic() + GATHER_S
        while queue.has_work and queue.has_room and not self.has_work:
            next_s = ANNOUNCED_S if self._arrivals.expected else CROWD_S if self._crowd else 0.0
            next_s = min(next_s, until - time.monotonic())
            if next_s <= 0 or (command := self._commands.take(next_s)) is None:
                return
            self._run_commands(command)

    def _run_commands(self, first: Command | None = None) -> None:
        """Runs ``first`` and then the commands that have come."""
        command = first or self._commands.take()
        while command is not None:
            run_command(self.parts, command)
            command = self._commands.take()
