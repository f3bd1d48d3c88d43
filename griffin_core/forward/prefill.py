"""Prefill: runs token ids through the model, hands out each layer's KV as it is computed, and
chooses the experts at the end.

Prompts are read in passes. A pass runs the model once over parts of one or more prompts, one after
the other in one batch of rows, so that the weights are read once for all of them. Each prompt has
its own attention, cache and statistic, so its result does not depend on the other prompts in its
passes, except for rounding.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import cast

import torch
from torch import Tensor

from griffin_core.backends.base import RunFF, Timestamp
from griffin_core.backends.batch import RowRuns
from griffin_core.experts.correction_fit import Tail
from griffin_core.experts.selection import Selection, select_together
from griffin_core.experts.slim_spec import SlimSpec
from griffin_core.experts.statistic import Statistics, relative
from griffin_core.forward.correction import corrected
from griffin_core.forward.events import (
    LayerActivations,
    LayerExperts,
    LayerKv,
    PrefillEvent,
    PrefillFinished,
    PromptExperts,
)
from griffin_core.forward.prompt import Part, Prompt
from griffin_core.kv.cache import KvCache
from griffin_core.model.decoder import Decoder
from griffin_core.spec.weights import Norm

CHUNK_TOKENS = 512

MAX_TOGETHER = 16
"""The most prompts in a pass. Each prompt needs memory for its statistics, 3 · L · F float32 (5.5
MB for Llama-3-8B), and its own attention call in every layer. 16 prompts of 128 tokens already fill
a pass of 2,048 tokens."""


@dataclass(frozen=True, kw_only=True)
class PromptRead:
    """The result of a prompt that was read to its end.

    Args:
        statistics: of all tokens so far.
        slim: the experts, without a correction: the first token does not wait for one.
        norm_mass: L values, as of ``SlimSpec.norm_mass``.
        tails: what a residual is fitted to; see ``corrected``.
        finished: the event that ends it.
    """

    decoder: Decoder
    prompt: Prompt
    statistics: Statistics
    slim: SlimSpec
    norm_mass: tuple[float, ...]
    tails: Sequence[Sequence[Tail]]
    finished: PrefillFinished

    def corrected(self) -> PromptRead:
        """Returns a copy whose experts have the correction that the prompt asks for."""
        slim = corrected(
            self.decoder, self.slim, self.statistics, self.prompt.selection, self.tails
        )
        return replace(self, slim=slim, tails=())

    def by_layer(self) -> list[LayerExperts]:
        """Returns the statistics and the experts as one event per layer."""
        layers = zip(self.statistics.sums.unbind(dim=1), self.slim.layers, strict=True)
        correction = self.slim.correction
        return [
            LayerExperts(
                layer=layer,
                sums=sums,
                experts=experts,
                correction=None if correction is None else correction.layer(layer),
            )
            for layer, (sums, experts) in enumerate(layers)
        ]

    def on_host(self) -> PromptRead:
        """Returns a copy in the CPU's memory, so that reading it does not wait for work that was
        submitted to the device later."""
        finished = replace(self.finished, last_hidden=self.finished.last_hidden.cpu())
        slim = self.slim.to(torch.device("cpu"))
        return replace(self, statistics=self.statistics.cpu(), slim=slim, finished=finished)

    def in_one_piece(self) -> PromptExperts:
        """Returns the statistics and the experts as a single event."""
        return PromptExperts(
            statistics=self.statistics,
            slim=self.slim,
            norm_mass=self.norm_mass,
            tails=self.tails,
        )


Tell = Callable[[Prompt, LayerKv | LayerActivations], None]
"""A callback for a prompt's events while a pass runs."""


@dataclass(frozen=True, kw_only=True)
class Pass:
    """A launched pass, which a GPU may still be running.

    Args:
        rows: the first row of each part, then the number of rows.
        hidden: [N, D], the output of the last layer.
        sums: [R, 3, L, F] float32, the statistics of each part.
        tails: for each part, what a residual is fitted to: a tail for each layer, or nothing.
    """

    decoder: Decoder
    parts: Sequence[Part]
    rows: Sequence[int]
    hidden: Tensor
    sums: Tensor
    tails: Sequence[Sequence[Tail]]
    began: Timestamp

    def end(self) -> list[PromptRead]:
        """Advances every prompt by its part, and chooses the experts of prompts that are read to
        their end.

        A pass that completes no prompt does not wait for the device; otherwise it waits once. If it
        raises, no prompt has advanced.

        Returns:
            A result for each prompt that is read to its end, in the order of the parts.
        """
        ended = self.decoder.backend.timestamp()
        total = self.rows[-1]
        last = [index for index, part in enumerate(self.parts) if part.is_last]
        so_far = [self._statistics_so_far(index) for index in range(len(self.parts))]
        chosen = self._choose(last, [so_far[index] for index in last]) if last else []
        for part, statistics, tails in zip(self.parts, so_far, self.tails, strict=True):
            prompt = part.prompt
            prompt.shares.append((self.began, ended, part.tokens / total))
            prompt.cache.advance(part.tokens)
            prompt.read += part.tokens
            prompt.layers_told = 0
            prompt.statistics = statistics
            prompt.tails = [] if part.is_last else [*prompt.tails, *([tails] if tails else [])]
        return chosen

    def _statistics_so_far(self, index: int) -> Statistics:
        """Returns the statistics of a prompt, this pass's part included."""
        part = self.parts[index]
        before, own = part.prompt.statistics, self._own(index)
        if before is not None:
            return before + own
        return own.clone() if len(self.parts) > 1 else own  # a view holds all parts' memory

    def _own(self, index: int) -> Statistics:
        return Statistics(sums=self.sums[index], tokens=self.parts[index].tokens)

    def _choose(self, last: Sequence[int], statistics: Sequence[Statistics]) -> list[PromptRead]:
        decoder = self.decoder
        prompts = [self.parts[index].prompt for index in last]
        ends = [self.rows[index + 1] for index in last]
        rows = torch.cat([self.hidden[end - 1 : end] for end in ends])
        hidden = decoder.final_hidden(rows).float().unbind()
        selecting = decoder.backend.timestamp()
        chosen = select_together(
            statistics,
            [prompt.selection for prompt in prompts],
            magnitude=decoder.magnitudes,
            calibration=decoder.calibration,
        )
        selected = decoder.backend.timestamp()
        statistics = [each.rooted() for each in statistics]
        # The only synchronization: after it the times of this pass and of earlier ones are known.
        masses = torch.stack(
            [slim.norm_mass_on_device(s.s2) for s, slim in zip(statistics, chosen, strict=True)]
        )
        norm_mass: list[list[float]] = masses.tolist()
        selection_s = _seconds(selecting, selected) / len(prompts)
        read = []
        for index, prompt in enumerate(prompts):
            own = self.parts[last[index]].tokens / self.rows[-1]
            shares = [*prompt.shares, (self.began, selecting, own)]
            compute_s = sum(_seconds(begin, end) * share for begin, end, share in shares)
            finished = PrefillFinished(
                last_hidden=hidden[index],
                compute_s=compute_s + selection_s,
                selection_s=selection_s,
            )
            read.append(
                PromptRead(
                    decoder=decoder,
                    prompt=prompt,
                    statistics=statistics[index],
                    slim=chosen[index],
                    norm_mass=tuple(norm_mass[index]),
                    tails=self._tails_of(last[index]),
                    finished=finished,
                )
            )
        return read

    def _tails_of(self, index: int) -> list[Sequence[Tail]]:
        """Returns what a prompt's residual is fitted to, of this pass and of those before."""
        own: Sequence[Tail] = self.tails[index]
        before = self.parts[index].prompt.tails
        return [*before, own] if own else list(before)


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


def _seconds(begin: Timestamp, end: Timestamp) -> float:
    """Returns the seconds between two timestamps of one device; waits for the second."""
    if isinstance(begin, float) or isinstance(end, float):
        return cast("float", end) - cast("float", begin)
    end.synchronize()
    return float(begin.elapsed_time(end)) / 1e3
