"""A decode step that the device may still be running."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from griffin_core.engine.session import Session
from griffin_core.engine.speculative_steps import Draft
from griffin_core.forward.draws import Drawn, Draws


@dataclass(frozen=True, kw_only=True)
class LaunchedStep:
    """Tokens that were launched and have not been read yet.

    Args:
        turns: the turn and the session of each sequence. The turn may be over by the time its token
            is read, and the session may even be in its next turn.
        densities: what each of them runs at.
        drafts: what was drafted for each of them.
        draw: the tokens: of each sequence one, and one more for each drafted token.
        apart: the tokens of those sessions whose draws depend on one another, by session id.
    """

    turns: Sequence[tuple[str, Session]]
    densities: Sequence[float]
    drafts: Sequence[Draft | None]
    draw: Draws
    apart: Mapping[str, Sequence[Drawn]]
