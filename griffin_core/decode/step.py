"""The model in the generation phase: one run for all sessions, each on its own experts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from griffin_core.kv_cache import KvCache
from griffin_core.model.decoder import Decoder, RunFF
from griffin_core.slim.base import SlimFF
from griffin_core.slim.zeroed import RowMasks, ZeroedLayers


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
def decode_tokens(
    decoder: Decoder, sessions: Sequence[StepTokens], masks: RowMasks | None = None
) -> list[StepLogits]:
    """Runs each session's tokens behind its cached ones, all in one batch. If it raises, no cache
    has moved on, and the same tokens may be run again.

    Args:
        masks: kept from step to step where sessions run zeroed, so that they are made once for the
            same sessions.

    Returns:
        One for each session, in the given order.
    """
    ranks: dict[int, int] = {}
    for session in sessions:
        ranks.setdefault(id(session.view), len(ranks))
    order = sorted(
        range(len(sessions)),
        key=lambda i: (_kind(decoder, sessions[i].view), ranks[id(sessions[i].view)]),
    )
    ordered = [sessions[i] for i in order]
    ids = torch.tensor([t for s in ordered for t in s.token_ids], device=decoder.device)
    x, batch = decoder.begin(ids, [(s.cache, len(s.token_ids)) for s in ordered])
    groups = _groups(decoder, ordered, masks or RowMasks())
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


DENSE, ZEROED, SLIM = range(3)
"""Kinds of views, in the order in which a step has their sessions."""

BlockOf = Callable[[int], RunFF]
"""A layer's number -> the FF block of some rows."""


def _kind(decoder: Decoder, view: Sequence[SlimFF]) -> int:
    if isinstance(view, ZeroedLayers):
        return ZEROED
    return DENSE if view[0] is decoder.layers[0].ff else SLIM


def _groups(
    decoder: Decoder, ordered: Sequence[StepTokens], masks: RowMasks
) -> list[tuple[int, BlockOf]]:
    """Rows that run one product together, as (how many, their block in each layer): those that run
    on all weights, dense or zeroed, and those of each slim view."""
    groups: list[tuple[int, BlockOf]] = []
    whole = [s for s in ordered if _kind(decoder, s.view) != SLIM]
    if whole:
        groups.append((sum(len(s.token_ids) for s in whole), _on_all(decoder, whole, masks)))
    last: Sequence[SlimFF] | None = None
    for session in ordered[len(whole) :]:
        rows = len(session.token_ids)
        if session.view is last:
            rows += groups.pop()[0]
        last = session.view
        groups.append((rows, last.__getitem__))
    return groups


def _on_all(decoder: Decoder, sessions: Sequence[StepTokens], masks: RowMasks) -> BlockOf:
    """The dense block of sessions that run on all weights, those that run zeroed at the end."""
    zeroed = [(s.view, len(s.token_ids)) for s in sessions if isinstance(s.view, ZeroedLayers)]
    if not zeroed:
        return lambda layer: decoder.layers[layer].ff
    views = [view for view, _ in zeroed]
    if len(sessions) == 1:
        return views[0].__getitem__
    if all(tokens == 1 for _, tokens in zeroed):
        of_rows = masks.of(views, decoder.dtype)
        return lambda layer: partial(decoder.layers[layer].ff.zeroed, keep=of_rows[layer])
    counts = torch.tensor([tokens for _, tokens in zeroed], device=decoder.device)

    def block(layer: int) -> RunFF:
        keep = torch.stack([view.keep[layer] for view in views])
        rows = keep.repeat_interleave(counts, dim=0).to(decoder.dtype)
        return partial(decoder.layers[layer].ff.zeroed, keep=rows)

    return block


def _grouped(groups: Sequence[tuple[int, BlockOf]], layer: int) -> RunFF:
    if len(groups) == 1:
        return groups[0][1](layer)
    sizes = [rows for rows, _ in groups]

    def run(x: Tensor) -> Tensor:
        parts = zip(torch.split_with_sizes(x, sizes), groups, strict=True)
        return torch.cat([block(layer)(rows) for rows, (_, block) in parts])

    return run
