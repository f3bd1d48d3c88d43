"""What an engine is given by its users: sinks for events, an observer, a source of prefills.

The engine calls all of them in its own thread, so none of their methods may block.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol, TypeVar

if TYPE_CHECKING:
    from griffin_core.engine.task import PrefillTask
    from griffin_core.experts.slim_spec import SlimSpec
    from griffin_core.forward.events import (
        PrefillEvent,
        PrefillFinished,
    )
    from griffin_core.spec.choices import DraftSource

E_contra = TypeVar("E_contra", contravariant=True)


class Sink(Protocol[E_contra]):
    """Where events go.

    A sink that is not ready pauses the session or the prompt that feeds it, and nothing else.
    """

    def put(self, event: E_contra) -> None:
        """Takes an event."""
        ...

    def ready(self) -> bool:
        """Whether there is room for more events."""
        ...


class Observer:
    """Is told about the engine's work, for metrics. This class does nothing; subclasses count."""

    def stepped(self, seconds: float, sessions: int) -> None:
        """A decode step for that many sessions took that many seconds."""

    def prefilled(self, event: PrefillFinished) -> None:
        """This engine has read a prompt, for a session of its own or for another server."""

    def speculated(self, source: DraftSource, drafted: int, accepted: int) -> None:
        """So many tokens of a session were drafted by a source, and so many of them accepted."""

    def checked(self, tokens: int, agreed: int) -> None:
        """So many tokens of a session were checked, and so many of them the dense model draws
        too."""

    def chose(self, slim: SlimSpec) -> None:
        """A session's prompt has chosen its experts."""


class PrefillReceiver(Protocol):
    """Takes what a prefill source has for one turn. May be called from any thread.

    Once the turn has ended, or its prefill has finished, everything further is ignored.
    """

    def receive(self, event: PrefillEvent) -> None:
        """Takes an event. ``PrefillFinished`` is the last one. After ``PrefillRestarted`` the
        events come anew from the first one."""
        ...

    def fail(self, error: Exception) -> None:
        """Ends the turn, and its session with it, with an error."""
        ...


class PrefillHandle(Protocol):
    """A prefill that a source has begun."""

    def cancel(self) -> object:
        """Ends it and frees what it holds. The engine calls this once, when the turn has ended for
        whatever reason; without effect on a prefill that has ended itself. Must not raise."""
        ...


class PrefillSource(Protocol):
    """Reads prompts for an engine that does not read them itself, such as a pool of servers."""

    def start(
        self,
        turn_id: str,
        task: PrefillTask,
        deadline: float | None,
        receiver: PrefillReceiver,
    ) -> PrefillHandle:
        """Begins to read a prompt. Called when its session has been admitted.

        Args:
            turn_id: the turn that the prompt belongs to.
            deadline: until when the turn's caller waits, on ``time.monotonic``; None for no limit.
            receiver: gets the events, or an error.

        Raises:
            GriffinError: the prefill cannot begin; the turn ends with that error.
        """
        ...
