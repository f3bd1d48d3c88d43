"""The model in the generation phase: tokens run on a session's experts."""

from __future__ import annotations

import torch
from torch import Tensor

from griffin_core.kv_cache import KvCache
from griffin_core.model.decoder import Decoder
from griffin_core.slim.base import SlimView


@torch.inference_mode()
def decode_tokens(decoder: Decoder, cache: KvCache, view: SlimView, token_ids: Tensor) -> Tensor:
    """Runs T tokens behind the cached ones with the FF blocks of ``view``.

    Args:
        cache: gets the tokens' keys and values; must have room.
        token_ids: [T] int64.

    Returns:
        Final hidden states [T, D], for ``Decoder.head``.
    """
    x, run = decoder.begin(token_ids, cache.length)
    for layer, ff in enumerate(view.layers):
        x = decoder.layer(layer, x, run, cache, ff)
    cache.advance(token_ids.shape[0])
    return decoder.final_hidden(x)
