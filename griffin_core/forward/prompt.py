"""A prompt on its way through the model, and the part of it that a pass reads."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from griffin_core.backends.base import Timestamp
from griffin_core.backends.transfers import on_device
from griffin_core.experts.correction_fit import FITTED_TOKENS, Tail
from griffin_core.experts.selection import Selection
from griffin_core.experts.statistic import Statistics
from griffin_core.kv.cache import KvCache
from griffin_core.model.decoder import Decoder


class Prompt:
    """A prompt during prefill: how far it is read, and its statistics so far.

    Args:
        token_ids: T >= 1 ids.
        selection: how its experts are chosen.
        cache: holds the tokens before these, and has room for these; None to make a new one.
        statistics: of the tokens before these; None if there are none. Not modified.
        tails: what a residual would be fitted to of the tokens before these.
        wants_kv: whether passes report each layer's KV as it is computed.
        watch: the layers whose activations passes report.
        wants_hidden: whether to keep what the head reads after each token.

    Raises:
        ValueError: there is no token.
    """

    def __init__(
        self,
        decoder: Decoder,
        token_ids: Sequence[int],
        selection: Selection,
        *,
        cache: KvCache | None = None,
        statistics: Statistics | None = None,
        tails: Sequence[Sequence[Tail]] = (),
        wants_kv: bool = False,
        watch: Collection[int] = (),
        wants_hidden: bool = False,
    ) -> None:
        if not token_ids:
            raise ValueError("prefill needs at least one token")
        self.selection = selection
        self.cache = decoder.new_cache(len(token_ids)) if cache is None else cache
        self.statistics = statistics
        self.wants_kv = wants_kv
        self.watch = watch
        self.wants_hidden = wants_hidden
        self.hidden: list[Tensor] = []
        """For each pass so far what the head reads after its tokens, [n, D], if that is wanted."""
        self.tokens = len(token_ids)
        self.read = 0
        """The number of tokens that passes have read."""
        self.shares: list[tuple[Timestamp, Timestamp, float]] = []
        """For each pass that it was in: begin, end, and its share of the pass's tokens."""
        self.layers_told = 0
        """The number of layers of the current pass that were reported. A failed pass is run again,
        and must not report the same layer twice."""
        self.tails: list[Sequence[Tail]] = list(tails)
        """For each pass so far that read some of the last tokens, what a residual is fitted to."""
        self._fitted_before = sum(len(each[0].x) for each in tails)
        self._ids = on_device(token_ids, torch.int64, decoder.device)

    @property
    def left(self) -> int:
        """The number of tokens still to read."""
        return self.tokens - self.read

    @property
    def tokens_fitted(self) -> int:
        """The number of its last tokens that a residual is fitted to; 0 if it gets none."""
        fits = self.selection.correction_for(self.tokens + self._fitted_before).kind == "residual"
        return min(self.tokens, FITTED_TOKENS - self._fitted_before) if fits else 0

    def next_ids(self, tokens: int) -> Tensor:
        """Returns the next ``tokens`` ids to read."""
        return self._ids[self.read : self.read + tokens]


@dataclass(frozen=True, kw_only=True)
class Part:
    """The part of one prompt that a pass reads: its next ``tokens`` tokens, at least one."""

    prompt: Prompt
    tokens: int

    @property
    def rows_fitted(self) -> int:
        """The number of its last rows that a residual is fitted to."""
        prompt = self.prompt
        after = prompt.left - self.tokens
        return max(0, min(self.tokens, prompt.tokens_fitted - after))

    @property
    def is_last(self) -> bool:
        """Whether this is the last part of the prompt."""
        return self.tokens == self.prompt.left
