"""What an engine tells about its work, for whoever counts."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from griffin_core.experts.expert_set import ExpertSet
    from griffin_core.forward.prefill import PrefillFinished


class Observer:
    """Does nothing; subclasses count. Called in the engine's thread, so no method may block."""

    def stepped(self, seconds: float, sessions: int) -> None:
        """A decode step of so many sessions took so long."""

    def prefilled(self, event: PrefillFinished) -> None:
        """This engine has run a prompt, its own or another's."""

    def chose(self, experts: ExpertSet) -> None:
        """A session's prompt has chosen its experts."""
