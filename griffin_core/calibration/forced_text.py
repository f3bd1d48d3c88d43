"""Teacher-forces a text after its prompt: dense, and on what any selection chooses there."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import torch
from torch import Tensor

from griffin_core.backends.base import RunFF
from griffin_core.experts.correction import CorrectionParams
from griffin_core.experts.selection import Selection, select_experts
from griffin_core.forward.correction import corrected
from griffin_core.forward.decode import StepTokens, decode_tokens
from griffin_core.forward.prefill import launch
from griffin_core.forward.prompt import Part, Prompt
from griffin_core.kv.cache import KvCache
from griffin_core.model.decoder import Decoder
from griffin_core.slim.zeroed import ZeroedLayers

ANYTHING = Selection(density=0.5, correction=CorrectionParams(kind="residual", rank=1))
"""A prompt that is read for this keeps all that any selection chooses by: its statistics, and what
a residual is fitted to."""


class ForcedText:
    """A text whose prompt is read once, dense. The tokens after it are given and not drawn.

    Args:
        token_ids: the prompt, then the tokens to force.
        prompt_tokens: the number of those in the prompt, at least 1.
    """

    @torch.inference_mode()
    def __init__(self, decoder: Decoder, token_ids: Sequence[int], prompt_tokens: int) -> None:
        self._decoder = decoder
        self._cache = decoder.new_cache(len(token_ids))
        self._rest = token_ids[prompt_tokens:]
        self._magnitude = cache(decoder.magnitudes)
        prompt = Prompt(decoder, token_ids[:prompt_tokens], ANYTHING, cache=self._cache)
        (self._read,) = launch(decoder, [Part(prompt=prompt, tokens=prompt_tokens)]).end()
        self.dense = self._forced([layer.ff for layer in decoder.layers])
        """Log-probabilities [T, V] float32 of the token after each forced one."""

    @torch.inference_mode()
    def pruned(self, selection: Selection) -> Tensor:
        """Returns the log-probabilities [T, V] on the experts of a selection."""
        read, decoder = self._read, self._decoder
        slim = select_experts(
            read.statistics,
            selection,
            magnitude=self._magnitude,
            calibration=decoder.calibration,
        )
        slim = corrected(decoder, slim, read.statistics, selection, read.tails)
        return self._forced(ZeroedLayers(decoder, slim))

    def _forced(self, view: Sequence[RunFF]) -> Tensor:
        return forced(self._decoder, self._rest, self._cache, view)


@torch.inference_mode()
def forced(
    decoder: Decoder, token_ids: Sequence[int], cache: KvCache, view: Sequence[RunFF]
) -> Tensor:
    """Teacher-forces tokens after those in the cache: log-probabilities [T, V] of the token after
    each. The cache is left as it was."""
    before = cache.length
    logits = decode_tokens(decoder, [StepTokens(cache=cache, view=view, token_ids=token_ids)])[0]
    cache.rewind(before)
    return logits.log_softmax(dim=1)
