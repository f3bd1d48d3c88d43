"""The prompt phase: token ids in; each layer's KV out as it is made, its experts at the end."""

from __future__ import annotations

import time
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor

from griffin_core.experts.selection import Selection, select_experts
from griffin_core.experts.statistic import add_s2, relative
from griffin_core.kv_cache import KvCache
from griffin_core.model.decoder import Decoder, RunFF

CHUNK_TOKENS = 512

AT_ONCE_S = 1e-3
"""A caller that comes back so soon has only taken a result, and its time is not told apart: reading
a GPU's events takes the host microseconds each, with the GPU waiting behind the last."""

Moment = float | torch.cuda.Event
"""Of the host's clock, or in the order of a GPU's work."""


@dataclass(frozen=True, kw_only=True)
class LayerKv:
    """One layer's keys and values for a run of tokens.

    Args:
        kv: [2, kv_heads, tokens, head_dim], keys then values. Possibly a view: copy it before the
            generator goes on for good.
        ready: on a GPU, when they are there; None if they are already, or come in order.
    """

    layer: int
    first_token: int
    kv: Tensor
    ready: torch.cuda.Event | None = None


@dataclass(frozen=True, kw_only=True)
class LayerExperts:
    """One layer's statistic over all tokens, and its experts.

    Args:
        s: [F] float32.
        experts: [K] int32, ascending.
    """

    layer: int
    s: Tensor
    experts: Tensor


@dataclass(frozen=True, kw_only=True)
class LayerActivations:
    """One layer's relative activations for a run of tokens, asked for by whoever studies them.

    Args:
        values: [tokens, F] float32, |Z_t| / ‖Z_t‖: what the statistic squares and adds up.
    """

    layer: int
    first_token: int
    values: Tensor


@dataclass(frozen=True, kw_only=True)
class PrefillFinished:
    """The end of a prefill.

    Args:
        last_hidden: [D] float32, what the head reads to give the first token's logits.
        compute_s: running the model, selection included.
        selection_s: choosing experts.
    """

    last_hidden: Tensor
    compute_s: float
    selection_s: float


@dataclass(frozen=True, kw_only=True)
class PrefillRestarted:
    """Another server begins the prefill anew: what came so far does not count."""


PrefillEvent = LayerKv | LayerExperts | PrefillFinished | PrefillRestarted


class Statistic:
    """s2 of every layer as tokens pass.

    Args:
        s2: [L, F] float32 to start from, of tokens already in the cache; zeros if None.
        watch: layers of which the last activations are kept.
    """

    def __init__(
        self, decoder: Decoder, s2: Tensor | None = None, watch: Collection[int] = ()
    ) -> None:
        self._decoder = decoder
        self._watch = watch
        self.activations: dict[int, Tensor] = {}
        """Z [T, F] of the watched layers, of what passed last."""
        shape = (len(decoder.layers), decoder.spec.ff_width)
        self.s2 = torch.zeros(shape, device=decoder.device) if s2 is None else s2.clone()

    def dense(self, layer: int) -> RunFF:
        """A layer's dense FF block, which counts what passes through it."""
        ff = self._decoder.layers[layer].ff

        def run(x: Tensor) -> Tensor:
            z, squares = ff.activations_and_squares(x)
            add_s2(self.s2[layer], z, squares)
            if layer in self._watch:
                self.activations[layer] = z
            return ff.output(z)

        return run


@torch.inference_mode()
def prefill(
    decoder: Decoder,
    token_ids: Sequence[int],
    selection: Selection,
    *,
    cache: KvCache | None = None,
    s2: Tensor | None = None,
    chunk_tokens: int = CHUNK_TOKENS,
    watch: Collection[int] = (),
) -> Iterator[PrefillEvent | LayerActivations | None]:
    """Runs a prompt dense, in chunks, and takes the statistic.

    A generator, so that its caller may do other work between chunks: it yields None after each
    chunk but the last. Results do not depend on the chunk size, but for rounding.

    Args:
        token_ids: T >= 1 ids.
        cache: holds the tokens before these, and room for these; a new one if None.
        s2: [L, F], the statistic of the tokens before these; None if there are none.
        chunk_tokens: most tokens that run at once.
        watch: layers whose activations are yielded.

    Yields:
        LayerKv for each chunk and layer, behind it LayerActivations if the layer is watched; then
        LayerExperts for each layer, PrefillFinished last.

    Raises:
        ValueError: no token.
    """
    if not token_ids:
        raise ValueError("prefill needs at least one token")
    if cache is None:
        cache = decoder.new_cache(len(token_ids))
    statistic = Statistic(decoder, s2, watch)
    ids = torch.tensor(token_ids, dtype=torch.int64, device=decoder.device)
    first = cache.length
    spans: list[tuple[Moment, Moment]] = []
    for begin in range(0, len(token_ids), chunk_tokens):
        chunk = ids[begin : begin + chunk_tokens]
        start, end = first + begin, first + begin + chunk.shape[0]
        is_last = begin + chunk_tokens >= len(token_ids)
        began = _moment(decoder.device)
        hidden, batch = decoder.begin(chunk, [(cache, chunk.shape[0])])
        for layer in range(len(decoder.layers)):
            hidden = decoder.layer(layer, hidden, batch, statistic.dense(layer))
            ended = _moment(decoder.device)
            ready = None if isinstance(ended, float) else ended
            kv = cache.room(layer, start, end)
            paused = time.perf_counter()
            yield LayerKv(layer=layer, first_token=start, kv=kv, ready=ready)
            if layer in watch:
                values = relative(statistic.activations.pop(layer))
                yield LayerActivations(layer=layer, first_token=start, values=values)
            if time.perf_counter() - paused > AT_ONCE_S:
                spans.append((began, ended))
                began = _moment(decoder.device)
        cache.advance(chunk.shape[0])
        if not is_last:
            spans.append((began, _moment(decoder.device)))
            yield None
    last_hidden = decoder.final_hidden(hidden[-1:])[0].float()
    selecting = _moment(decoder.device)
    spans.append((began, selecting))
    experts = select_experts(statistic.s2, selection, magnitude=decoder.magnitudes).unbind()
    s = statistic.s2.sqrt().unbind()
    selection_s = _seconds(selecting, _moment(decoder.device))
    compute_s = sum(_seconds(*span) for span in spans) + selection_s
    for layer in range(len(decoder.layers)):
        yield LayerExperts(layer=layer, s=s[layer], experts=experts[layer])
    yield PrefillFinished(last_hidden=last_hidden, compute_s=compute_s, selection_s=selection_s)


def _moment(device: torch.device) -> Moment:
    """Now, or on a GPU when it has done what it was given so far: it is not waited for."""
    if device.type != "cuda":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
    event.record()
    return event


def _seconds(begin: Moment, end: Moment) -> float:
    """Between two moments of one device; waits for the second."""
    if isinstance(begin, float) or isinstance(end, float):
        return cast("float", end) - cast("float", begin)
    end.synchronize()
    return float(begin.elapsed_time(end)) / 1e3
