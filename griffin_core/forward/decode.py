"""The model in the generation phase: one run for all sessions, each on its own experts.

``decode_tokens`` gives logits of given tokens. A ``Stepper`` runs a step of the engine's loop: each
session's last token through the model, and its next one drawn, without the host knowing either.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from griffin_core.backends.cuda import on_device, to_host
from griffin_core.kv.cache import KvCache
from griffin_core.model.decoder import Decoder, RunFF
from griffin_core.sampling.logprobs import Logprobs, RowLogprobs, logprobs_of
from griffin_core.sampling.sampler import Sampler
from griffin_core.slim.base import SlimFF
from griffin_core.slim.zeroed import RowMasks, ZeroedLayers

if TYPE_CHECKING:
    from griffin_core.forward.invariant import RowsApart


@dataclass(frozen=True, kw_only=True)
class StepTokens:
    """Given tokens of one session.

    Args:
        cache: holds what is before them; must have room for them.
        view: the FF block of each layer. Sessions with the same list share every product.
        token_ids: at least one.
    """

    cache: KvCache
    view: Sequence[SlimFF]
    token_ids: Sequence[int]

    @property
    def tokens(self) -> int:
        return len(self.token_ids)


@dataclass(frozen=True, kw_only=True)
class StepRow:
    """One session in a step of the loop: the token that its slot drew last is run, and its next
    one is drawn.

    Args:
        cache: holds what is before that token; must have room for it.
        view: as in ``StepTokens``.
        slot: of the sampler.
        top_logprobs: how many log-probabilities to give with the token; None for none at all.
    """

    cache: KvCache
    view: Sequence[SlimFF]
    slot: int
    top_logprobs: int | None = None

    @property
    def tokens(self) -> int:
        return 1


Run = StepTokens | StepRow


@dataclass(frozen=True, kw_only=True)
class Drawn:
    """A session's next token.

    Args:
        token: its id; -1 if the logits were not finite.
        logprobs: if they were asked for.
    """

    token: int
    logprobs: Logprobs | None = None


class Draw:
    """Tokens that a device draws, perhaps still at work.

    Args:
        tokens: [N] int64 on the device.
        top_logprobs: for each row as in ``StepRow``.
        logits: [N, V] float32 that the tokens were drawn from. What is needed of them is taken now:
            they may be gone with the next step.
    """

    def __init__(self, tokens: Tensor, top_logprobs: Sequence[int | None], logits: Tensor) -> None:
        self.logits = logits
        self._asked = {row: top for row, top in enumerate(top_logprobs) if top is not None}
        self._logprobs: RowLogprobs | None = None
        if self._asked:
            rows = on_device(list(self._asked), torch.int64, tokens.device)
            most = max(self._asked.values())
            self._logprobs = logprobs_of(logits, rows, tokens, most).to_host()
        self._tokens = to_host(tokens)
        self._ready: torch.cuda.Event | None = None
        if tokens.device.type == "cuda":
            self._ready = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._ready.record()

    def wait(self) -> list[Drawn]:
        """The tokens of all rows; waits for the device."""
        if self._ready is not None:
            self._ready.synchronize()
        drawn = [Drawn(token=token) for token in self._tokens.tolist()]
        if self._logprobs is not None:
            for index, (row, top) in enumerate(self._asked.items()):
                logprobs = self._logprobs.read(index, top)
                drawn[row] = Drawn(token=drawn[row].token, logprobs=logprobs)
        return drawn


class DrawLost(Exception):
    """Tokens were drawn and cannot be read. The sampler has moved on, so the rows must not be run
    again; the cause is what went wrong."""


def draw_of(tokens: Tensor, top_logprobs: Sequence[int | None], logits: Tensor) -> Draw:
    """As ``Draw``.

    Raises:
        DrawLost: what is needed of it cannot be taken.
    """
    try:
        return Draw(tokens, top_logprobs, logits)
    except Exception as error:
        raise DrawLost from error


class Draws(Protocol):
    """Tokens that a device draws, of one ``Draw`` or several."""

    @property
    def logits(self) -> Tensor:
        """See ``Draw``."""
        ...

    def wait(self) -> list[Drawn]:
        """The tokens of all rows; waits for the device."""
        ...


@dataclass(frozen=True, kw_only=True)
class JoinedDraws:
    """Several draws, the rows of one after those of another."""

    parts: Sequence[Draws]

    @property
    def logits(self) -> Tensor:
        return torch.cat([part.logits for part in self.parts])

    def wait(self) -> list[Drawn]:
        return [drawn for part in self.parts for drawn in part.wait()]


class Stepper(Protocol):
    """Runs steps of the engine's loop."""

    def launch(self, rows: Sequence[StepRow]) -> Draws:
        """Runs each row's last token after its cached ones and draws its next token, all in one
        batch. On return every cache has moved on by one token, which the device may still be
        writing.

        Raises:
            DrawLost: the tokens were drawn and are lost: the rows' sessions must end.
            Exception: anything else. No cache has moved on, and the same rows may be run again.
        """
        ...


@dataclass(frozen=True, kw_only=True)
class LayeredStep:
    """Runs a step layer by layer, on any device.

    Args:
        masks: kept from step to step where sessions run zeroed, so that they are made once for the
            same sessions.
        apart: if given, it runs the model: see ``decode.apart``.
    """

    decoder: Decoder
    sampler: Sampler
    masks: RowMasks = field(default_factory=RowMasks)
    apart: RowsApart | None = None

    @torch.inference_mode()
    def launch(self, rows: Sequence[StepRow]) -> Draw:
        order = _by_view(self.decoder, rows)
        ordered = [rows[i] for i in order]
        device = self.decoder.device
        slots = on_device([row.slot for row in ordered], torch.int64, device)
        # A row whose logits were not finite has drawn -1; its session is about to be told.
        ids = self.sampler.drawn[slots].clamp_(min=0)
        if self.apart is None:
            logits = _forward(self.decoder, ordered, ids, self.masks)
        else:
            logits = self.apart.forward(ordered, ids)
        starts = [row.cache.length + 1 for row in ordered]
        positions = on_device(starts, torch.int64, device)
        if order != sorted(order):  # back to the order of the rows
            places = sorted(range(len(order)), key=order.__getitem__)
            back = on_device(places, torch.int64, device)
            logits, slots, positions = logits[back], slots[back], positions[back]
        tokens = self.sampler.sample(logits, slots, positions)
        for row in rows:
            row.cache.advance(1)
        return draw_of(tokens, [row.top_logprobs for row in rows], logits)


@torch.inference_mode()
def decode_tokens(
    decoder: Decoder, sessions: Sequence[StepTokens], masks: RowMasks | None = None
) -> list[Tensor]:
    """Runs each session's tokens after its cached ones, all in one batch. If it raises, no cache
    has moved on, and the same tokens may be run again.

    Args:
        masks: kept from step to step, as in ``LayeredStep``.

    Returns:
        Logits [T, V] float32 for each session, one row after each of its tokens.
    """
    order = _by_view(decoder, sessions)
    ordered = [sessions[i] for i in order]
    ids = torch.tensor([t for s in ordered for t in s.token_ids], device=decoder.device)
    logits = _forward(decoder, ordered, ids, masks or RowMasks())
    parts = torch.split_with_sizes(logits, [s.tokens for s in ordered])
    for session in ordered:
        session.cache.advance(session.tokens)
    by_session = dict(zip(order, parts, strict=True))
    return [by_session[index] for index in range(len(sessions))]


def _forward(decoder: Decoder, runs: Sequence[Run], ids: Tensor, masks: RowMasks) -> Tensor:
    """Logits [N, V] after each of ids [N], of runs in the order of their views."""
    x, batch = decoder.begin(ids, [(run.cache, run.tokens) for run in runs])
    groups = _groups(decoder, runs, masks)
    for layer in range(len(decoder.layers)):
        x = decoder.layer(layer, x, batch, _grouped(groups, layer))
    return decoder.head(decoder.final_hidden(x))


def _by_view(decoder: Decoder, runs: Sequence[Run]) -> list[int]:
    """Their order with those of one product side by side."""
    ranks: dict[int, int] = {}
    for run in runs:
        ranks.setdefault(id(run.view), len(ranks))
    return sorted(
        range(len(runs)),
        key=lambda i: (_kind(decoder, runs[i].view), ranks[id(runs[i].view)]),
    )


DENSE, ZEROED, SLIM = range(3)
"""Kinds of views, in the order in which a step has their sessions."""

BlockOf = Callable[[int], RunFF]
"""A layer's number -> the FF block of some rows."""


def _kind(decoder: Decoder, view: Sequence[SlimFF]) -> int:
    if isinstance(view, ZeroedLayers):
        return ZEROED
    return DENSE if view[0] is decoder.layers[0].ff else SLIM


def _groups(decoder: Decoder, ordered: Sequence[Run], masks: RowMasks) -> list[tuple[int, BlockOf]]:
    """Rows that run one product together, as (how many, their block in each layer): those that run
    on all weights, dense or zeroed, and those of each slim view."""
    groups: list[tuple[int, BlockOf]] = []
    whole = [s for s in ordered if _kind(decoder, s.view) != SLIM]
    if whole:
        groups.append((sum(s.tokens for s in whole), _on_all(decoder, whole, masks)))
    last: Sequence[SlimFF] | None = None
    for session in ordered[len(whole) :]:
        rows = session.tokens
        if session.view is last:
            rows += groups.pop()[0]
        last = session.view
        groups.append((rows, last.__getitem__))
    return groups


def _on_all(decoder: Decoder, sessions: Sequence[Run], masks: RowMasks) -> BlockOf:
    """The dense block of sessions that run on all weights, those that run zeroed at the end."""
    zeroed = [(s.view, s.tokens) for s in sessions if isinstance(s.view, ZeroedLayers)]
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
