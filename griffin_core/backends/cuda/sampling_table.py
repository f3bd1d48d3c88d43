"""Numbers that the kernels of the draw agree on, and the columns of the table of slots."""

from __future__ import annotations

import triton.language as tl

BLOCK = 1024
MOST_SPLITS = 32
"""The most programs that share a row. For a vocabulary of 128,256 each has about 4,000 tokens, so
one row occupies a quarter of an H100, and four rows all of it."""

FIELDS = 16
"""The number of columns of the table of slots, int32; the last six in use hold float32 bits."""

SAMPLES: tl.constexpr = tl.constexpr(0)
BIASED: tl.constexpr = tl.constexpr(1)
PENALIZED: tl.constexpr = tl.constexpr(2)
TOP_K: tl.constexpr = tl.constexpr(3)
SEED_LOW: tl.constexpr = tl.constexpr(4)
SEED_HIGH: tl.constexpr = tl.constexpr(5)
INVERSE_TEMPERATURE: tl.constexpr = tl.constexpr(6)
TOP_P: tl.constexpr = tl.constexpr(7)
MIN_P: tl.constexpr = tl.constexpr(8)
REPETITION: tl.constexpr = tl.constexpr(9)
PRESENCE: tl.constexpr = tl.constexpr(10)
FREQUENCY: tl.constexpr = tl.constexpr(11)
WIDTH: tl.constexpr = tl.constexpr(FIELDS)

BINS: tl.constexpr = tl.constexpr(1024)
BINS_PER_NAT: tl.constexpr = tl.constexpr(32.0)
MASS_ONE: tl.constexpr = tl.constexpr(2.0**40)
"""The mass of the most likely token."""

LARGEST: tl.constexpr = tl.constexpr(3.4028234663852886e38)
INFINITE: tl.constexpr = tl.constexpr(0x7F800000)
NOT_FINITE: tl.constexpr = tl.constexpr(0x7FFFFFFFFFFFFFFF)
LOWEST: tl.constexpr = tl.constexpr(-0x80000000)
HIGHEST: tl.constexpr = tl.constexpr(0x7FFFFFFF)
