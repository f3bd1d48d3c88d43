"""Samples a token for each row of logits on a CPU, without sorting the vocabulary.

Each thread of the team takes whole rows. Stages that a row does not need are skipped: a greedy row
is one pass over its logits. The stages are (docs/adr/0014-the-sampler.md):

1. Find the largest and the smallest logit, as integers in the same order; they also show whether
   all logits are finite.
2. Compute weights w = exp((x - largest) / temperature), and assign each token to a bin by its
   distance to the largest logit.
3. top_k and top_p cut the ranking (logits descending, token ids ascending among equals) after some
   token. A histogram of counts or probability masses finds the bin of the cut; bisection over that
   bin's logits finds the cut. Masses are integers, so their sums do not depend on their order.
4. Run the race: token i has the key -log(1 - v_i) / w_i, with v_i uniform in (0, 1) by Philox; the
   smallest key wins, which happens with probability w_i / Σ w.
"""

from __future__ import annotations

from functools import partial

import numpy as np
import torch
from numba import njit, types

from griffin_core.backends.cpu.arithmetic import exp
from griffin_core.backends.cpu.bfloat16 import at, bits_of, float_of
from griffin_core.backends.cpu.race import BLOCK, race
from griffin_core.backends.cpu.team import FAST, Kernel, team_rank, team_size

BINS = 2048
"""The number of bins of the histogram."""

BINS_PER_NAT = np.float32(64.0)
"""The number of bins per factor e between weights, for rows whose weights span more than the bins
do."""

MASS_ONE = np.float32(2.0**40)
"""The mass of the most likely token; masses are integers. The sum over 2^18 such tokens is below
2^63."""

(
    SAMPLES,
    TOP_K,
    SEED,
    BIASES,
    BIAS_TOKENS,
    BIAS_VALUES,
    SEEN,
    INVERSE_TEMPERATURE,
    TOP_P,
    MIN_P,
    REPETITION,
    PRESENCE,
    FREQUENCY,
    BANS,
    BAN_TOKENS,
    FIELDS,
) = range(16)
"""The columns of the table of slots, int64: whether the slot samples (else it is greedy); top_k;
the seed; the number and the addresses of the logit biases (int64 tokens, float32 values); the
address of the seen tokens [V] int32 (bit 0: in the prompt; the other bits: times drawn), or 0; six
float32 parameters as the bits of an int32; and the number and the address of the tokens (int64)
that are never drawn."""

_loop = partial(
    njit, fastmath=FAST, error_model="numpy", no_cpython_wrapper=True, no_cfunc_wrapper=True
)()
_part = partial(njit, inline="always")()
"""Most of the compile time is saved by leaving out the wrappers for calls from Python, and by
having few levels of calls: LLVM processes a function again in each function that calls it."""

_INFINITE = np.int32(0x7F800000)
_LARGEST = np.float32(torch.finfo(torch.float32).max)


@Kernel
def sample_rows(a):
    slots, positions = at(a[1], types.int64), at(a[2], types.int64)
    tokens, drawn = at(a[4], types.int64), at(a[5], types.int64)
    rank, size, rows, vocab_size = team_rank(), team_size(), a[8], a[9]
    for row in range(rank, rows, size):
        slot = slots[row]
        settings = a[3] + 8 * FIELDS * slot
        token = _sample_row(
            a[0] + 4 * vocab_size * row, settings, positions[row], a[6] + a[7] * rank, vocab_size
        )
        tokens[row] = token
        drawn[slot] = token


@_part
def _sample_row(logits, settings, position, scratch, size):
    """Samples one row's token, and counts it as seen."""
    own = at(settings, types.int64)
    x = at(logits, types.float32)
    largest, smallest = _extremes(at(logits, types.int32), size)
    token = types.int64(-1)
    if largest < _INFINITE and smallest > -_INFINITE - 1:
        if own[BIASES] != 0 or own[SEEN] != 0 or own[BANS] != 0:
            _process_logits(x, at(scratch, types.float32), settings, size)
            x = at(scratch, types.float32)
            largest, smallest = _extremes(at(scratch, types.int32), size)
        top = _float_of_key(largest)
        if own[SAMPLES] != 0:
            token = _sample_token(
                x, top, _float_of_key(smallest), settings, position, scratch, size
            )
        else:
            token = _index_of(x, top)
        if own[SEEN] != 0:
            at(own[SEEN], types.int32)[token] += types.int32(2)
    return token


@_part
def _sample_token(x, top, bottom, settings, position, scratch, size):
    own = at(settings, types.int64)
    padded = (size + BLOCK - 1) // BLOCK * BLOCK
    w = at(scratch + 4 * padded, types.float32)
    inverse = _float(own[INVERSE_TEMPERATURE])
    top_k, top_p = own[TOP_K], _float(own[TOP_P])
    _weigh(x, w, top, inverse, size, padded)
    banned = at(own[BAN_TOKENS], types.int64)
    # At the highest temperatures a distance alone does not make the weight 0.
    for i in range(own[BANS]):
        w[banned[i]] = np.float32(0.0)
    if top_k != 0 or top_p < np.float32(1.0):
        _find_bins(x, at(scratch + 8 * padded, types.int32), top, bottom, inverse, size)
    for by_mass in range(2):
        if by_mass == 0 and top_k == 0:
            continue
        if by_mass == 1 and top_p >= np.float32(1.0):
            continue
        wanted = top_k
        if by_mass == 1:
            share = np.float64(top_p) * np.float64(_mass(w, size))
            wanted = max(types.int64(share), types.int64(1))
        bins, chosen = scratch + 8 * padded, scratch + 12 * padded
        sums = scratch + 16 * padded
        count, wanted = _cut_bin(w, bins, sums, chosen, by_mass, wanted, size)
        _drop(x, w, chosen, count, by_mass, wanted, size)
    return race(
        w,
        padded,
        _float(own[MIN_P]),
        own[SEED],
        position,
        scratch + 16 * padded + 8 * BINS,
    )


@_part
def _float(bits):
    return float_of(types.int32(bits))


@_part
def _key(bits):
    """Maps the bits of a float32 to an int32 in the same order, with -0 before 0."""
    return types.int32(bits ^ ((bits >> types.int32(31)) & types.int32(0x7FFFFFFF)))


@_part
def _float_of_key(key):
    return float_of(_key(key))  # _key is its own inverse


@_part
def _key_of(x):
    """Returns the key of a float32, the same for 0 and -0."""
    return types.int64(_key(types.int32(bits_of(x)))) if x != np.float32(0.0) else types.int64(0)


@_part
def _mass_of(weight):
    return types.int64(weight * MASS_ONE)


@_loop
def _extremes(bits, size):
    """Returns the largest and the smallest key. Keys are integers, since LLVM does not vectorize a
    maximum of floats that may be NaN."""
    largest, smallest = types.int32(-0x80000000), types.int32(0x7FFFFFFF)
    for i in range(size):
        key = _key(bits[i])
        largest = max(largest, key)
        smallest = min(smallest, key)
    return largest, smallest


@_loop
def _index_of(x, value):
    """Returns the index of the first element equal to a value, which must exist."""
    i = types.int64(0)
    while x[i] != value:
        i += 1
    return i


@_loop
def _process_logits(x, processed, settings, size):
    """Writes x with biases and penalties to ``processed``: finite, except for banned tokens, which
    get -infinity."""
    own = at(settings, types.int64)
    for i in range(size):
        processed[i] = x[i]
    tokens, values = at(own[BIAS_TOKENS], types.int64), at(own[BIAS_VALUES], types.float32)
    for i in range(own[BIASES]):
        y = processed[tokens[i]] + values[i]
        processed[tokens[i]] = min(max(y, -_LARGEST), _LARGEST)
    if own[SEEN] != 0:
        seen = at(own[SEEN], types.int32)
        repetition, presence = _float(own[REPETITION]), _float(own[PRESENCE])
        frequency = _float(own[FREQUENCY])
        for i in range(size):
            y = processed[i]
            repeated = y / repetition if y > np.float32(0.0) else y * repetition
            y = repeated if seen[i] != 0 else y
            times = seen[i] >> types.int32(1)
            y -= presence if times > 0 else np.float32(0.0)
            y -= frequency * types.float32(times)
            processed[i] = min(max(y, -_LARGEST), _LARGEST)
    banned = at(own[BAN_TOKENS], types.int64)
    for i in range(own[BANS]):
        processed[banned[i]] = -np.float32(np.inf)


@_loop
def _weigh(x, w, top, inverse, size, padded):
    for i in range(size):
        # Clipped before multiplying, since 0 · infinity is NaN.
        distance = min(top - x[i], _LARGEST) * inverse
        w[i] = exp(-distance) if distance < np.float32(87.0) else np.float32(0.0)
    for i in range(size, padded):
        w[i] = np.float32(0.0)


@_loop
def _mass(w, size):
    total = types.int64(0)
    for i in range(size):
        total += _mass_of(w[i])
    return total


@_loop
def _find_bins(x, bins, top, bottom, inverse, size):
    last = np.float32(BINS - 1)
    scale = last / min(max(top - bottom, np.float32(1e-30)), _LARGEST)
    scale = min(max(scale, BINS_PER_NAT * inverse), _LARGEST)
    for i in range(size):
        bins[i] = types.int32(min(min(top - x[i], _LARGEST) * scale, last))


@_loop
def _cut_bin(w, bins_at, sums_at, chosen_at, by_mass, wanted, size):
    """Finds the bin in which the wanted count or mass is reached, and writes its tokens to
    ``chosen``.

    Returns:
        The number of those tokens, and the count or mass that is still wanted from them.
    """
    bins, chosen = at(bins_at, types.int32), at(chosen_at, types.int32)
    sums = at(sums_at, types.int64)
    for i in range(BINS):
        sums[i] = 0
    if by_mass != 0:
        for i in range(size):
            sums[bins[i]] += _mass_of(w[i])
    else:
        for i in range(size):
            sums[bins[i]] += 1
    found = types.int64(0)
    while found < BINS - 1 and sums[found] < wanted:
        wanted -= sums[found]
        found += 1
    count = types.int64(0)
    for i in range(size):
        chosen[count] = i
        count += bins[i] == found
    return count, wanted


@_loop
def _drop(x, w, chosen_at, count, by_mass, wanted, size):
    """Sets the weights after the cut to 0. The cut is at the chosen token where the wanted count or
    mass is reached. It is found by bisection over keys; both ends of the interval are always keys
    of chosen tokens."""
    chosen = at(chosen_at, types.int32)
    low, high = types.int64(0x7FFFFFFF), types.int64(-0x80000000)
    for j in range(count):
        key = _key_of(x[chosen[j]])
        low, high = min(low, key), max(high, key)
    above = types.int64(0)  # count or mass above the interval
    while low < high:
        middle = low + ((high - low + 1) >> 1)
        total, next_low, next_high = types.int64(0), high, low
        for j in range(count):
            i = chosen[j]
            key = _key_of(x[i])
            if key >= middle:
                total += _mass_of(w[i]) if by_mass != 0 else types.int64(1)
                next_low = min(next_low, key)
            else:
                next_high = max(next_high, key)
        if total >= wanted:
            low = next_low
        else:
            high, above = next_high, total
    limit = _float_of_key(types.int32(low))
    for i in range(size):
        w[i] = w[i] if x[i] >= limit else np.float32(0.0)
    wanted -= above
    for j in range(count):  # among equals the first ones stay
        i = chosen[j]
        if x[i] == limit:
            if wanted <= 0:
                w[i] = np.float32(0.0)
            wanted -= _mass_of(w[i]) if by_mass != 0 else types.int64(1)
