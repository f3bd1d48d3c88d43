"""The bytes that a decode step of one session must read at least."""

from __future__ import annotations

from collections.abc import Sequence

from griffin_core.kv.pool import kv_bytes
from griffin_core.model.decoder import Decoder
from griffin_core.spec.model import ModelSpec


def attention_weights(spec: ModelSpec) -> int:
    """Returns the number of weights of a layer's attention: queries, keys, values and output."""
    return 2 * (spec.num_heads + spec.num_kv_heads) * spec.head_dim * spec.hidden_size


def step_bytes(decoder: Decoder, density: float, cached_tokens: int) -> float:
    """Returns the bytes of the weights that a token uses and of its session's KV."""
    spec = decoder.spec
    attention = len(spec.layers) * attention_weights(spec) * decoder.dtype.itemsize
    ff = sum(layer.ff.weights.nbytes for layer in decoder.layers)
    head = spec.vocab_size * spec.hidden_size * decoder.dtype.itemsize
    return attention + ff * density + head + kv_bytes(spec, decoder.dtype, cached_tokens)


def step_ceilings_ms(
    decoder: Decoder, densities: Sequence[float], cached_tokens: int, bandwidth: float
) -> dict[str, float]:
    """Returns the milliseconds of a step at each density if only reading took time.

    Args:
        bandwidth: bytes/s.
    """
    return {
        str(density): round(step_bytes(decoder, density, cached_tokens) / bandwidth * 1e3, 1)
        for density in densities
    }
