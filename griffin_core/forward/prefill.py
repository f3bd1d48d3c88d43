"""Prefill: runs token ids through the model, hands out each layer's KV as it is computed, and
chooses the experts at the end.

Prompts are read in passes. A pass runs the model once over parts of one or more prompts, one after
the other in one batch of rows, so that the weights are read once for all of them. Each prompt has
its own attention, cache and statistic, so its result does not depend on the other prompts in its
passes, except for rounding.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from itertools import accumulate

import torch
from torch import Tensor

from griffin_core.backends.base import RunFF
from griffin_core.backends.batch import RowRuns
from griffin_core.experts.correction_fit import Tail
from griffin_core.experts.selection import Selection
from griffin_core.experts.statistic import Statistics, relative
from griffin_core.forward.events import (
    LayerActivations,
    LayerKv,
    PrefillEvent,
)
from griffin_core.forward.prompt import Part, Prompt
from griffin_core.forward.prompt_pass import Pass, Tell
from griffin_core.kv.cache import KvCache
from griffin_core.model.decoder import Decoder
from griffin_core.spec.weights import Norm

CHUNK_TOKENS = 512

MAX_TOGETHER = 16
"""The most prompts in a pass. Each prompt needs memory for its statistics, 3 · L · F float32 (5.5
MB for Llama-3-8B), and its own attention call in every layer. 16 prompts of 128 tokens already fill
a pass of 2,048 tokens."""


Launch = Callable[[Decoder, Sequence[Part], Tell], Pass]
"""The signature of ``launch``, which runs a pass."""


@torch.inference_mode()
def launch(decoder: Decoder, parts: Sequence[Part], tell: Tell = lambda *_: None) -> Pass:
    """Runs the model dense over parts of several prompts, and computes the statistic of each.

    No prompt advances before ``Pass.end``, so that after an error the same parts can be run again.

    Args:
        parts: at least one, each from another prompt.
        tell: called with LayerKv, then LayerActivations, for prompts that want them, layer by
            layer. On a GPU the values are not computed yet when it is called; they follow in stream
            order.
    """
    device = decoder.device
    began = decoder.backend.timestamp()
    rows = (0, *accumulate(part.tokens for part in parts))
    runs = RowRuns.of(rows, device)
    spec = decoder.spec
    shape = (len(parts), 3, len(decoder.layers), spec.intermediate_size)
    sums = torch.zeros(shape, device=device)
    tails: list[list[Tail]] = [[] for _ in parts]
    ids = [part.prompt.next_ids(part.tokens) for part in parts]
    hidden, attention = decoder.prepare_batch(
        ids[0] if len(ids) == 1 else torch.cat(ids),
        [(part.prompt.cache, part.tokens) for part in parts],
    )
    readers = [(i, part) for i, part in enumerate(parts) if part.prompt.wants_kv]
    watched = {layer for part in parts for layer in part.prompt.watch}
    activations: dict[int, Tensor] = {}
    fitted = [
        (own, part.rows_fitted, end) for own, part, end in zip(tails, parts, rows[1:], strict=True)
    ]

    def keep_tails(x: Tensor, z: Tensor) -> None:
        for own, count, end in fitted:
            if count:
                tail = slice(end - count, end)
                own.append(Tail(x=x[tail].clone(), z=z[tail].clone()))

    for layer in range(len(decoder.layers)):
        kept = activations if layer in watched else None
        hidden = decoder.layer(
            layer, hidden, attention, counting_ff(decoder, layer, sums, runs, kept, keep_tails)
        )
        if readers or layer in watched:
            z = activations.pop(layer, None)
            ready = decoder.backend.event() if readers else None
            for index, part in enumerate(parts):
                of_part = None if z is None else z[rows[index] : rows[index + 1]]
                _tell_layer(part, layer, ready, of_part, tell)
    return Pass(
        decoder=decoder,
        parts=parts,
        rows=rows,
        hidden=hidden,
        sums=sums,
        tails=tails,
        began=began,
    )


def counting_ff(
    decoder: Decoder,
    layer: int,
    sums: Tensor,
    runs: RowRuns,
    activations: dict[int, Tensor] | None = None,
    keep: Callable[[Tensor, Tensor], None] | None = None,
) -> RunFF:
    """Returns a layer's dense FF block that also adds the statistics of its input to sums [R, 3, L,
    F].

    Args:
        runs: the rows of each prompt.
        activations: if given, Z [N, F] is put there under the layer's number.
        keep: called with the normalized input [N, D] and with Z.
    """
    ff, backend = decoder.layers[layer].ff, decoder.backend

    def run(x: Tensor, norm: Norm | None = None, residual: Tensor | None = None) -> Tensor:
        x = x if norm is None else backend.norm(x, norm)
        z, squares = ff.activations(x)
        backend.add_statistic(sums[:, :, layer], z, squares, runs)
        if keep is not None:
            keep(x, z)
        if activations is not None:
            activations[layer] = z
        return ff.output(z, residual)

    return run


def _tell_layer(
    part: Part, layer: int, ready: torch.cuda.Event | None, z: Tensor | None, tell: Tell
) -> None:
    """Reports one layer of a prompt, unless a failed pass has already reported it."""
    prompt = part.prompt
    if layer < prompt.layers_told:
        return
    start = prompt.cache.length
    if prompt.wants_kv:
        kv = prompt.cache.slice(layer, start, start + part.tokens)
        tell(prompt, LayerKv(layer=layer, first_token=start, kv=kv, ready=ready))
    if z is not None and layer in prompt.watch:
        tell(prompt, LayerActivations(layer=layer, first_token=start, values=relative(z)))
    prompt.layers_told = layer + 1


@torch.inference_mode()
def prefill(
    decoder: Decoder,
    token_ids: Sequence[int],
    selection: Selection,
    *,
    cache: KvCache | None = None,
    statistics: Statistics | None = None,
    chunk_tokens: int = CHUNK_TOKENS,
    watch: Collection[int] = (),
) -> Iterator[PrefillEvent | LayerActivations | None]:
    """Prefills one prompt dense, in chunks, and computes its statistic.

    This is a generator, so that its caller can do other work between chunks: it yields None after
    each chunk but the last. Results do not depend on the chunk size, except for rounding.

    Args:
        token_ids, cache, statistics, watch: as for ``Prompt``.
        chunk_tokens: the most tokens that run at once.

    Yields:
        LayerKv for each chunk and layer, followed by LayerActivations if the layer is watched;
        then LayerExperts for each layer, and PrefillFinished last.

    Raises:
        ValueError: there is no token.
    """
    prompt = Prompt(
        decoder,
        token_ids,
        selection,
        cache=cache,
        statistics=statistics,
        wants_kv=True,
        watch=watch,
    )
    while True:
        told: list[tuple[Prompt, LayerKv | LayerActivations]] = []
        part = Part(prompt=prompt, tokens=min(chunk_tokens, prompt.left))
        read = launch(decoder, [part], lambda *each, to=told: to.append(each)).end()
        yield from (event for _, event in told)
        for done in read:
            yield from done.corrected().by_layer()
            yield done.finished
            return
        yield None
