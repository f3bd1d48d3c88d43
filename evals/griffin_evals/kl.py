"""KL divergence from the dense model and agreement with it, for many selections on one text."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from griffin_core.calibration.forced_text import ForcedText
from griffin_core.experts.selection import Selection
from griffin_core.model.load import Model
from griffin_evals.study.measures import divergence, same_first_choice

PROMPT_TOKENS, SCORED_TOKENS = 384, 128
"""The number of prompt tokens and of scored tokens in a window."""


@dataclass(frozen=True, kw_only=True)
class Divergence:
    """The divergence from the dense model on one window.

    Args:
        kl: the mean KL(dense || pruned) over the scored tokens, in nats.
        agreement: the share of scored tokens with the same most likely next token as the dense
            model.
    """

    kl: float
    agreement: float


def token_windows(token_ids: Sequence[int]) -> list[Sequence[int]]:
    """Returns windows of PROMPT_TOKENS + SCORED_TOKENS without overlap; the rest is left out."""
    step = PROMPT_TOKENS + SCORED_TOKENS
    return [token_ids[at : at + step] for at in range(0, len(token_ids) - step + 1, step)]


@torch.inference_mode()
def divergences(
    model: Model, window: Sequence[int], prompt_tokens: int, selections: Sequence[Selection]
) -> Iterator[Divergence]:
    """Yields the divergence of each selection. The prompt is run once, dense; its statistics choose
    the experts of each selection, on which the other tokens are teacher-forced."""
    text = ForcedText(model.decoder, window, prompt_tokens)
    for selection in selections:
        pruned = text.pruned(selection)
        yield Divergence(
            kl=float(divergence(text.dense, pruned).mean()),
            agreement=float(same_first_choice(text.dense, pruned).mean()),
        )
