"""A pass over prompts once it is launched, and what comes of the prompts that it ends."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import cast

import torch
from torch import Tensor

from griffin_core.backends.base import Timestamp
from griffin_core.experts.correction_fit import Tail
from griffin_core.experts.selection import select_together
from griffin_core.experts.slim_spec import SlimSpec
from griffin_core.experts.statistic import Statistics
from griffin_core.forward.correction import corrected
from griffin_core.forward.events import (
    LayerActivations,
    LayerExperts,
    LayerKv,
    PrefillFinished,
    PromptExperts,
)
from griffin_core.forward.prompt import Part, Prompt
from griffin_core.model.decoder import Decoder


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
            hidden=torch.cat(self.prompt.hidden) if self.prompt.wants_hidden else None,
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
        read = zip(self.parts, so_far, self.tails, self._hidden(), strict=True)
        for part, statistics, tails, hidden in read:
            prompt = part.prompt
            prompt.hidden += hidden
            prompt.shares.append((self.began, ended, part.tokens / total))
            prompt.cache.advance(part.tokens)
            prompt.read += part.tokens
            prompt.layers_told = 0
            prompt.statistics = statistics
            prompt.tails = [] if part.is_last else [*prompt.tails, *([tails] if tails else [])]
        return chosen

    def _hidden(self) -> list[list[Tensor]]:
        """Returns for each part what the head reads after its tokens, if its prompt wants it."""
        spans = zip(self.parts, pairwise(self.rows), strict=True)
        return [
            [self.decoder.final_hidden(self.hidden[begin:end])] if part.prompt.wants_hidden else []
            for part, (begin, end) in spans
        ]

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


def _seconds(begin: Timestamp, end: Timestamp) -> float:
    """Returns the seconds between two timestamps of one device; waits for the second."""
    if isinstance(begin, float) or isinstance(end, float):
        return cast("float", end) - cast("float", begin)
    end.synchronize()
    return float(begin.elapsed_time(end)) / 1e3
