"""Samples a token for each row of logits on a GPU, without sorting the vocabulary and without
waiting for the host.

It takes four launches, whatever the rows request; a row that does not need a stage leaves it at
once. In all launches but the last, several programs share a row. (docs/adr/0014-the-sampler.md)

1. ``_process_logits`` finds the largest and the smallest logit, and whether all are finite. For a
   row with biases or penalties it writes the processed logits.
2. ``_count`` makes a histogram of distances to the largest logit for rows with top_k or top_p: the
   number of tokens and the probability mass in each bin.
3. ``_race``: tokens in bins before the cut are kept, and race: token i has the key
   -log(1 - v_i) / w_i with v_i uniform in (0, 1) by Philox, and the smallest key wins. Tokens in
   the bin that contains the cut are listed.
4. ``_finish`` finds the cut among the listed tokens by bisection over logits, lets those before it
   race too, and writes the token.

Masses are integers, so that sums do not depend on the order in which programs add to them.
"""

from __future__ import annotations

import triton
import triton.language as tl

from griffin_core.backends.cuda.sampling_cut import (
    find_cut,
    race_listed,
)
from griffin_core.backends.cuda.sampling_pieces import (
    bin_of,
    bin_scale,
    float_of_key,
    key_of,
    mass_of,
    race_keys,
    read_float,
    read_number,
    read_seed,
    read_top,
    row_of,
    wanted_mass_of,
    weight_of,
)
from griffin_core.backends.cuda.sampling_table import (
    BIASED,
    BINS,
    FREQUENCY,
    HIGHEST,
    INFINITE,
    INVERSE_TEMPERATURE,
    LARGEST,
    LOWEST,
    MIN_P,
    NOT_FINITE,
    PENALIZED,
    PRESENCE,
    REPETITION,
    SAMPLES,
    TOP_K,
    TOP_P,
)
from griffin_core.backends.cuda.tuning import (
    pdl_wait,
)


@triton.jit
def process_logits(
    logits,
    slots,
    table,
    bias,
    seen,
    processed,
    tops,
    bottoms,
    counts,
    masses,
    lengths,
    vocab_size,
    SPLITS: tl.constexpr,
    BLOCK: tl.constexpr,
    OVERLAPS: tl.constexpr,
):
    pdl_wait(OVERLAPS)
    row, split = tl.program_id(0).to(tl.int64), tl.program_id(1)
    slot = tl.load(slots + row)
    biased, penalized = read_number(table, slot, BIASED), read_number(table, slot, PENALIZED)
    repetition = read_float(table, slot, REPETITION)
    presence, frequency = read_float(table, slot, PRESENCE), read_float(table, slot, FREQUENCY)
    share = tl.cdiv(tl.cdiv(vocab_size, SPLITS), BLOCK) * BLOCK
    begin = split * share
    end = tl.minimum(begin + share, vocab_size)
    best = tl.full((BLOCK,), LOWEST, tl.int64) << 32
    lowest = tl.full((BLOCK,), HIGHEST, tl.int32)
    bad = tl.zeros((BLOCK,), tl.int32)
    for first in range(begin, end, BLOCK):
        tokens = first + tl.arange(0, BLOCK)
        inside = tokens < end
        x = tl.load(logits + row * vocab_size + tokens, mask=inside, other=0.0)
        size = x.to(tl.int32, bitcast=True) & 0x7FFFFFFF
        bad = tl.maximum(bad, (size >= INFINITE).to(tl.int32))
        banned = tl.zeros((BLOCK,), tl.int32)
        if biased != 0:
            added = tl.load(bias + slot * vocab_size + tokens, mask=inside, other=0.0)
            banned = (added < -LARGEST).to(tl.int32)
            x += added
        if penalized != 0:
            known = tl.load(seen + slot * vocab_size + tokens, mask=inside, other=0)
            repeated = tl.where(x > 0.0, tl.div_rn(x, repetition), x * repetition)
            x = tl.where(known != 0, repeated, x)
            times = known >> 1
            x -= tl.where(times > 0, presence, 0.0)
            x -= frequency * times.to(tl.float32)
        if (biased != 0) | (penalized != 0):
            x = tl.minimum(tl.maximum(x, -LARGEST), LARGEST)
            x = tl.where(banned != 0, float("-inf"), x)
            tl.store(processed + row * vocab_size + tokens, x, mask=inside)
        key = key_of(x)
        packed = (key.to(tl.int64) << 32) | (tokens ^ 0x7FFFFFFF).to(tl.int64)
        best = tl.where(inside, tl.maximum(best, packed), best)
        lowest = tl.where(inside, tl.minimum(lowest, key), lowest)
    top = tl.where(tl.max(bad, axis=0) != 0, NOT_FINITE, tl.max(best, axis=0))
    tl.store(tops + row * SPLITS + split, top)
    tl.store(bottoms + row * SPLITS + split, tl.min(lowest, axis=0))
    # Clears the buffers of the next launches.
    bins = split * (BINS // SPLITS) + tl.arange(0, BINS // SPLITS)
    tl.store(counts + row * BINS + bins, 0)
    tl.store(masses + row * BINS + bins, 0)
    if split == 0:
        tl.store(lengths + row, 0)


@triton.jit
def count_bins(
    logits,
    processed,
    slots,
    table,
    tops,
    bottoms,
    counts,
    masses,
    lengths,
    vocab_size,
    SPLITS: tl.constexpr,
    BLOCK: tl.constexpr,
    OVERLAPS: tl.constexpr,
):
    pdl_wait(OVERLAPS)
    row, split = tl.program_id(0).to(tl.int64), tl.program_id(1)
    slot = tl.load(slots + row)
    by_count = read_number(table, slot, TOP_K) != 0
    by_mass = read_float(table, slot, TOP_P) < 1.0
    if (read_number(table, slot, SAMPLES) != 0) & (by_count | by_mass):
        inverse = read_float(table, slot, INVERSE_TEMPERATURE)
        top = float_of_key((read_top(tops, row, SPLITS) >> 32).to(tl.int32))
        scale = bin_scale(bottoms, row, top, inverse, SPLITS)
        source = row_of(logits, processed, table, slot, row, vocab_size)
        share = tl.cdiv(tl.cdiv(vocab_size, SPLITS), BLOCK) * BLOCK
        begin = split * share
        end = tl.minimum(begin + share, vocab_size)
        for first in range(begin, end, BLOCK):
            tokens = first + tl.arange(0, BLOCK)
            inside = tokens < end
            x = tl.load(source + tokens, mask=inside, other=0.0)
            at = row * BINS + tl.where(inside, bin_of(x, top, scale), 0)
            if by_count:
                tl.atomic_add(counts + at, 1, mask=inside, sem="relaxed")
            if by_mass:
                mass = mass_of(weight_of(x, top, inverse))
                tl.atomic_add(masses + at, mass, mask=inside & (mass > 0), sem="relaxed")


@triton.jit
def race(
    logits,
    processed,
    slots,
    table,
    tops,
    bottoms,
    counts,
    masses,
    lengths,
    listed,
    positions,
    bests,
    vocab_size,
    SPLITS: tl.constexpr,
    BLOCK: tl.constexpr,
    OVERLAPS: tl.constexpr,
):
    pdl_wait(OVERLAPS)
    row, split = tl.program_id(0).to(tl.int64), tl.program_id(1)
    slot = tl.load(slots + row)
    if read_number(table, slot, SAMPLES) != 0:
        top_k, top_p = read_number(table, slot, TOP_K), read_float(table, slot, TOP_P)
        min_p = read_float(table, slot, MIN_P)
        inverse = read_float(table, slot, INVERSE_TEMPERATURE)
        top = float_of_key((read_top(tops, row, SPLITS) >> 32).to(tl.int32))
        scale = bin_scale(bottoms, row, top, inverse, SPLITS)
        source = row_of(logits, processed, table, slot, row, vocab_size)
        # Bins before ``sure`` are kept. The cut is in one of the bins [sure, unsure). The cut of
        # top_k, which determines the total mass that top_p is a share of, is in bin ``counted``.
        sure = tl.full((), BINS, tl.int32)
        unsure, counted = sure, sure
        bins = row * BINS + tl.arange(0, BINS)
        if top_k != 0:
            counted = tl.sum((tl.cumsum(tl.load(counts + bins), axis=0) < top_k).to(tl.int32))
            sure, unsure = counted, counted + 1
        if top_p < 1.0:
            mass = tl.load(masses + bins)
            upto = tl.cumsum(mass, axis=0)
            order = tl.arange(0, BINS)
            least = tl.sum(tl.where(order < counted, mass, 0))
            most = tl.sum(tl.where(order <= counted, mass, 0))
            sure = tl.sum((upto < wanted_mass_of(top_p, least)).to(tl.int32))
            last = tl.sum((upto < wanted_mass_of(top_p, most)).to(tl.int32))
            unsure = tl.minimum(last, counted) + 1
        position = tl.load(positions + row)
        seed = read_seed(table, slot)
        zero = tl.zeros((BLOCK // 4,), tl.int32)
        low = zero + position.to(tl.int32)
        high = zero + (position >> 32).to(tl.int32)
        best = tl.full((BLOCK,), NOT_FINITE, tl.int64)
        share = tl.cdiv(tl.cdiv(vocab_size, SPLITS), BLOCK) * BLOCK
        begin = split * share
        end = tl.minimum(begin + share, vocab_size)
        for first in range(begin, end, BLOCK):
            tokens = first + tl.arange(0, BLOCK)
            inside = tokens < end
            x = tl.load(source + tokens, mask=inside, other=0.0)
            w = weight_of(x, top, inverse)
            place = bin_of(x, top, scale)
            kept = inside & (place < sure) & (w >= min_p) & (w > 0.0)
            open_ = inside & (((place >= sure) & (place < unsure)) | (place == counted))
            open_ = open_ & (sure < BINS)
            both = tl.sum(kept.to(tl.int32) + (open_.to(tl.int32) << 16), axis=0)
            if both >= 65536:
                at = tl.atomic_add(lengths + row, both >> 16, sem="relaxed")
                at += tl.cumsum(open_.to(tl.int32), axis=0) - 1
                tl.store(listed + row * vocab_size + at, tokens, mask=open_)
            if (both & 65535) != 0:
                counters = first // 4 + tl.arange(0, BLOCK // 4)
                r0, r1, r2, r3 = tl.philox(seed, counters, low, high, zero)
                bits = tl.interleave(tl.interleave(r0, r2), tl.interleave(r1, r3))
                best = tl.minimum(best, race_keys(bits, w, tokens, kept))
        tl.store(bests + row * SPLITS + split, tl.min(best, axis=0))


@triton.jit
def finish(
    logits,
    processed,
    slots,
    table,
    tops,
    bottoms,
    counts,
    masses,
    lengths,
    listed,
    positions,
    bests,
    seen,
    drawn,
    out,
    vocab_size,
    SPLITS: tl.constexpr,
    BLOCK: tl.constexpr,
    OVERLAPS: tl.constexpr,
):
    pdl_wait(OVERLAPS)
    row = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots + row)
    packed = read_top(tops, row, SPLITS)
    token = (packed & 0xFFFFFFFF) ^ 0x7FFFFFFF
    if packed == NOT_FINITE:
        token = tl.full((), -1, tl.int64)
    elif read_number(table, slot, SAMPLES) != 0:
        best = tl.min(tl.load(bests + row * SPLITS + tl.arange(0, SPLITS)), axis=0)
        top_k, top_p = read_number(table, slot, TOP_K), read_float(table, slot, TOP_P)
        if (top_k != 0) | (top_p < 1.0):
            inverse = read_float(table, slot, INVERSE_TEMPERATURE)
            top = float_of_key((packed >> 32).to(tl.int32))
            scale = bin_scale(bottoms, row, top, inverse, SPLITS)
            source = row_of(logits, processed, table, slot, row, vocab_size)
            own, length = listed + row * vocab_size, tl.load(lengths + row)
            count = tl.load(counts + row * BINS + tl.arange(0, BINS)).to(tl.int64)
            mass = tl.load(masses + row * BINS + tl.arange(0, BINS))
            limit, last = find_cut(
                own, length, source, count, mass, top, scale, inverse, top_k, top_p, BLOCK
            )
            found = race_listed(
                own,
                length,
                source,
                top,
                inverse,
                read_float(table, slot, MIN_P),
                limit,
                last,
                read_seed(table, slot),
                tl.load(positions + row),
                BLOCK,
            )
            best = tl.minimum(best, found)
        token = best & 0xFFFFFFFF
    tl.store(out + row, token)
    tl.store(drawn + slot, token)
    if (token >= 0) & (read_number(table, slot, PENALIZED) != 0):
        at = seen + slot * vocab_size + token
        tl.store(at, tl.load(at) + 2)
