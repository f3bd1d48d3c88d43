"""Small pieces of the kernels of the draw: reads of a slot's parameters, keys, weights, bins."""

from __future__ import annotations

import triton
import triton.language as tl

from griffin_core.backends.cuda.sampling_table import (
    BIASED,
    BINS,
    BINS_PER_NAT,
    LARGEST,
    MASS_ONE,
    NOT_FINITE,
    PENALIZED,
    SEED_HIGH,
    SEED_LOW,
    WIDTH,
)


@triton.jit
def read_number(table, slot, FIELD: tl.constexpr):
    return tl.load(table + slot * WIDTH + FIELD)


@triton.jit
def read_float(table, slot, FIELD: tl.constexpr):
    return read_number(table, slot, FIELD).to(tl.float32, bitcast=True)


@triton.jit
def key_of(x):
    """Maps a float32 to an int32 in the same order; 0 and -0 have the same key."""
    bits = x.to(tl.int32, bitcast=True)
    return tl.where(x == 0.0, 0, bits ^ ((bits >> 31) & 0x7FFFFFFF))


@triton.jit
def float_of_key(key):
    return (key ^ ((key >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def read_top(tops, row, SPLITS: tl.constexpr):
    """Returns the row's largest logit: its key in the upper half, 2^31 - 1 - its first token in the
    lower half."""
    return tl.max(tl.load(tops + row * SPLITS + tl.arange(0, SPLITS)), axis=0)


@triton.jit
def bin_scale(bottoms, row, top, inverse, SPLITS: tl.constexpr):
    """Returns the number of bins per unit of distance to the largest logit."""
    bottom = float_of_key(tl.min(tl.load(bottoms + row * SPLITS + tl.arange(0, SPLITS)), axis=0))
    spread = tl.minimum(tl.maximum(top - bottom, 1e-30), LARGEST)
    least = tl.full((), BINS - 1, tl.float32) / spread
    return tl.minimum(tl.maximum(least, inverse * BINS_PER_NAT), LARGEST)


@triton.jit
def distance_to(x, top):
    return tl.minimum(top - x, LARGEST)  # clipped: 0 · infinity is NaN


@triton.jit
def weight_of(x, top, inverse):
    distance = distance_to(x, top) * inverse
    # A banned token has weight 0 at any temperature.
    return tl.where((distance < 87.0) & (x >= -LARGEST), tl.exp(-distance), 0.0)


@triton.jit
def bin_of(x, top, scale):
    return tl.minimum(distance_to(x, top) * scale, BINS - 1.0).to(tl.int32)


@triton.jit
def mass_of(w):
    return (w * MASS_ONE).to(tl.int64)


@triton.jit
def wanted_mass_of(top_p, mass):
    share = (top_p.to(tl.float64) * mass.to(tl.float64)).to(tl.int64)
    return tl.maximum(share, 1)


@triton.jit
def race_keys(bits, w, tokens, kept):
    """Returns keys of the race in the upper half and tokens in the lower half; the largest int64 if
    not kept."""
    v = tl.minimum((bits.to(tl.float32) + 0.5) * 2.3283064365386963e-10, 0.99999994)
    series = v * (0.5 + v * (0.3333333333333333 + v * 0.25))
    waited = tl.where(v < 0.015625, v * (1.0 + series), -tl.log(1.0 - v))
    key = (waited / tl.where(kept, w, 1.0)).to(tl.int32, bitcast=True).to(tl.int64)
    return tl.where(kept, (key << 32) | tokens.to(tl.int64), NOT_FINITE)


@triton.jit
def read_seed(table, slot):
    low = read_number(table, slot, SEED_LOW).to(tl.int64) & 0xFFFFFFFF
    return low | (read_number(table, slot, SEED_HIGH).to(tl.int64) << 32)


@triton.jit
def row_of(logits, processed, table, slot, row, vocab_size):
    """Returns a pointer to the row of logits, after biases and penalties if it has any."""
    own = (read_number(table, slot, BIASED) != 0) | (read_number(table, slot, PENALIZED) != 0)
    offset = row * vocab_size
    return processed + offset if own else logits + offset
