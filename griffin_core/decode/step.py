"""The model in the generation phase: one run for all sessions, each on its own experts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from griffin_core.kv_cache import KvCache
from griffin_core.model.decoder import Decoder, RunFF
from griffin_core.slim.base import SlimFF


@dataclass(frozen=True, kw_only=True)
class StepTokens:
    """One session's tokens in a step.

    Args:
        cache: holds what is before them; must have room for them.
        view: the FF block of each layer. Sessions with the same list share every product.
        token_ids: at least one.
    """

    cache: KvCache
    view: Sequence[SlimFF]
    token_ids: Sequence[int]


@dataclass(frozen=True, kw_only=True)
class StepLogits:
    """What the model makes of one session's tokens.

    Args:
        logits: [T, V] float32, behind each of them.
        likeliest: T token ids, the largest of each row.
    """

    logits: Tensor
    likeliest: Sequence[int]


Stepper = Callable[[Sequence[StepTokens]], list[StepLogits]]
"""Runs each session's tokens, as ``decode_tokens`` does."""


@torch.inference_mode()
def decode_tokens(decoder: Decoder, sessions: Sequence[StepTokens]) -> list[StepLogits]:
    """Runs each session's tokens behind its cached ones, all in one batch. If it raises, no cache
    has moved on, and the same tokens may be run again.

    Returns:
        One for each session, in the given order.
    """
    ranks: dict[int, int] = {}
    for session in sessions:
        ranks.setdefault(id(session.view), len(ranks))
    order = sorted(range(len(sessions)), key=lambda i: ranks[id(sessions[i].view)])
    ordered = [sessions[i] for i in order]
    ids = torch.tensor([t for s in ordered for t in s.token_ids], device=decoder.device)
    x, batch = decoder.begin(ids, [(s.cache, len(s.token_ids)) for s in ordered])
    groups = _groups(ordered)
    for layer in range(len(decoder.layers)):
        x = decoder.layer(layer, x, batch, _grouped(groups, layer))
    logits = decoder.head(decoder.final_hidden(x))
    likeliest = logits.argmax(dim=1).tolist()
    results: dict[int, StepLogits] = {}
    for index, run in zip(order, batch.runs, strict=True):
        rows = slice(run.first_row, run.first_row + run.tokens)
        results[index] = StepLogits(logits=logits[rows], likeliest=likeliest[rows])
    for session in ordered:
        session.cache.advance(len(session.token_ids))
    return [results[index] for index in range(len(sessions))]


def _groups(ordered: Sequence[StepTokens]) -> list[tuple[int, Sequence[SlimFF]]]:
    """Runs of sessions with one view, as (rows, view)."""
    groups: list[tuple[int, Sequence[SlimFF]]] = []
    for session in ordered:
        rows = len(session.token_ids)
        if groups and groups[-1][1] is session.view:
            rows += groups.pop()[0]
        groups.append((rows, session.view))
    return groups


def _grouped(groups: Sequence[tuple[int, Sequence[SlimFF]]], layer: int) -> RunFF:
    if len(groups) == 1:
        return groups[0][1][layer]
    sizes = [rows for rows, _ in groups]

    def run(x: Tensor) -> Tensor:
        parts = zip(torch.split_with_sizes(x, sizes), groups, strict=True)
        return torch.cat([view[layer](rows) for rows, (_, view) in parts])

    return run
