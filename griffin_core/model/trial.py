"""A trial run at load, so that a model that cannot run is refused before it is served."""

from __future__ import annotations

import torch

from griffin_core.errors import BadModelFile, DeviceMemoryExhausted
from griffin_core.model.decoder import Decoder
from griffin_core.model.files import one_line

TRIED_TOKENS = 32
"""The number of tokens in the trial run. With fewer keys than a vector register holds (16), torch's
attention on a CPU does not propagate NaN from queries and keys (measured with 2.13)."""


@torch.inference_mode()
def try_token(decoder: Decoder, bos_id: object) -> None:
    """Runs a token, repeated ``TRIED_TOKENS`` times, through a loaded decoder.

    Args:
        bos_id: the token; token 0 is used if it is not in the vocabulary.

    Raises:
        BadModelFile: the logits are not finite, or the run raises.
        DeviceMemoryExhausted: the device has no room for the run.
    """
    known = isinstance(bos_id, int) and 0 <= bos_id < decoder.spec.vocab_size
    token = bos_id if known else 0
    tokens = [token] * min(TRIED_TOKENS, decoder.spec.context_length)
    try:
        cache = decoder.new_cache(len(tokens))
        ids = torch.tensor(tokens, device=decoder.device)
        x, attention = decoder.prepare_batch(ids, [(cache, len(tokens))])
        x = decoder.forward(x, attention, decoder.dense)
        finite = bool(decoder.logits(x).isfinite().all())
    except torch.OutOfMemoryError as error:
        raise DeviceMemoryExhausted(f"no room to run one token: {one_line(error)}") from error
    except Exception as error:  # kernels may raise anything for unusual shapes and values
        raise BadModelFile(f"model: running token {token} fails: {one_line(error)}") from error
    if not finite:
        dtype = str(decoder.dtype).removeprefix("torch.")
        raise BadModelFile(
            f"model: the logits after token {token} are NaN or infinite in {dtype}; allowed: "
            "finite values. Its weights are damaged, or too large for this data type"
        )
