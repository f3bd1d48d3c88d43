"""Steps in which what a session makes does not depend, to the bit, on the sessions beside it.

In which order a library adds up the terms of a product depends on how many rows the product has. So
every product of such a step has the same number of rows: those of some sessions, filled up with
rows that belong to none. Everything else is either exact (sums, masks, copies) or a row's own:
attention, norms, activations. All sessions run on all weights, dense or zeroed outside their set,
for a copy of a set adds up in another order, too.
"""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from griffin_core.forward.decode import Run, StepTokens
from griffin_core.model.decoder import Decoder
from griffin_core.slim.zeroed import RowMasks, ZeroedLayers

ROWS = 8
"""Rows of each product. Of SmolLM2 in bfloat16 a step of 1, 4 and 16 sessions took 1.8, 1.4 and 1.3
times as long as one of any number of rows; with 16 rows it was 2.1, 1.5 and 1.0 times, and with the
kernel of one row called for each 1.0, 2.2 and 3.7 times."""


class RowsApart:
    """Runs one token of each of several sessions, no row's result depending on other rows."""

    def __init__(self, decoder: Decoder) -> None:
        self._decoder = decoder
        self._padding = [decoder.new_cache(1) for _ in range(ROWS - 1)]
        self._masks: dict[int, RowMasks] = defaultdict(RowMasks)  # by the first row of a part

    def forward(self, runs: Sequence[Run], ids: Tensor) -> Tensor:
        """Runs a token of each run; no cache moves on.

        Args:
            runs: of one token each, those that run dense before those that run zeroed.
            ids: [N] int64, the tokens.

        Returns:
            Logits [N, V] float32.
        """
        firsts = range(0, len(runs), ROWS)
        parts = [self._part(i, runs[i : i + ROWS], ids[i : i + ROWS]) for i in firsts]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _part(self, first: int, runs: Sequence[Run], ids: Tensor) -> Tensor:
        decoder, missing = self._decoder, ROWS - len(runs)
        caches = [*self._padding[:missing], *(run.cache for run in runs)]
        x, batch = decoder.begin(F.pad(ids, (missing, 0)), [(cache, 1) for cache in caches])
        zeroed = [run.view for run in runs if isinstance(run.view, ZeroedLayers)]
        keep = self._masks[first].of(zeroed, decoder.dtype) if zeroed else None
        for index, layer in enumerate(decoder.layers):
            own = None if keep is None else keep[index]
            x = decoder.layer(index, x, batch, partial(layer.ff.apart, keep=own))
        return decoder.head(decoder.final_hidden(x))[missing:]


@torch.inference_mode()
def rows_stay_apart(decoder: Decoder) -> bool:
    """Whether that holds on this machine, by trial: a token's logits are the same in each of the
    places of a product, beside whatever tokens."""
    draw, apart = random.Random(0), RowsApart(decoder)
    dense = [layer.ff for layer in decoder.layers]

    def logits(tokens: Sequence[int]) -> Tensor:
        runs = [
            StepTokens(cache=decoder.new_cache(1), view=dense, token_ids=[token])
            for token in tokens
        ]
        return apart.forward(runs, torch.tensor(tokens, device=decoder.device))

    token, *others = (draw.randrange(decoder.spec.vocabulary) for _ in range(ROWS))
    alone = logits([token])[0]
    beside = [logits([*others[:place], token, *others[place:]])[place] for place in range(ROWS)]
    return all(torch.equal(alone, own) for own in beside)
