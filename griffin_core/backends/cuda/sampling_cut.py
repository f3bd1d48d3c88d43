"""The exact cut of top_k or top_p inside one bin, by bisection over the bin's own logits."""

from __future__ import annotations

import triton
import triton.language as tl

from griffin_core.backends.cuda.sampling_pieces import (
    bin_of,
    float_of_key,
    key_of,
    mass_of,
    race_keys,
    wanted_mass_of,
    weight_of,
)
from griffin_core.backends.cuda.sampling_table import (
    BINS,
    HIGHEST,
    LOWEST,
    NOT_FINITE,
)


@triton.jit
def find_cut(
    own, length, source, count, mass, top, scale, inverse, top_k, top_p, BLOCK: tl.constexpr
):
    """Finds the cut in the ranking. Returns the key of the last logit that is kept, and the last
    token that is kept among those equal to it. top_k cuts first, then top_p cuts what is left.

    Args:
        own, length: the listed tokens.
        count, mass: [BINS] int64, over all tokens.
    """
    order = tl.arange(0, BINS)
    limit, last = tl.full((), LOWEST, tl.int64), tl.full((), HIGHEST, tl.int64)
    equal = tl.full((), 0, tl.int64)
    total = tl.sum(mass, axis=0)
    for stage in range(2):
        by_mass = stage == 1
        if (by_mass & (top_p < 1.0)) | ((stage == 0) & (top_k != 0)):
            amounts = tl.where(by_mass, mass, count)
            wanted = tl.where(by_mass, wanted_mass_of(top_p, total), top_k.to(tl.int64))
            place = tl.sum((tl.cumsum(amounts, axis=0) < wanted).to(tl.int32), axis=0)
            wanted -= tl.sum(tl.where(order < place, amounts, 0), axis=0)
            # Bisection over keys; both ends of the interval are always keys of tokens in this bin.
            low, high = _ends(own, length, source, top, scale, place, BLOCK)
            above = tl.full((), 0, tl.int64)
            while low < high:
                middle = low + ((high - low + 1) >> 1)
                over, next_low, next_high = _over(
                    own, length, source, top, scale, inverse, place, by_mass, middle, BLOCK
                )
                if over >= wanted:
                    low = next_low
                else:
                    high = next_high
                    above = over
            limit = low
            each = tl.full((), 1, tl.int64)
            if by_mass:
                each = tl.maximum(
                    mass_of(weight_of(float_of_key(limit.to(tl.int32)), top, inverse)), 1
                )
            equal = (wanted - above + each - 1) // each
            kept = tl.sum(tl.where(order < place, mass, 0), axis=0)
            total = kept + _kept_mass(
                own, length, source, top, scale, inverse, place, limit, equal, BLOCK
            )
    # Among equals the first tokens stay.
    there, first, final = _equals(own, length, source, limit, HIGHEST, BLOCK)
    if there > equal:
        low, high = first, final
        while low < high:
            middle = (low + high) // 2
            there, first, final = _equals(own, length, source, limit, middle, BLOCK)
            if there >= equal:
                high = final
            else:
                low = middle + 1
        last = low
    return limit, last


@triton.jit
def _listed(own, length, source, first, BLOCK: tl.constexpr):
    """Loads a block of listed tokens and their logits, and returns which of them are within the
    list."""
    at = first + tl.arange(0, BLOCK)
    inside = at < length
    tokens = tl.load(own + at, mask=inside, other=0)
    return tokens, tl.load(source + tokens, mask=inside, other=0.0), inside


@triton.jit
def _ends(own, length, source, top, scale, place, BLOCK: tl.constexpr):
    """Returns the smallest and the largest key of a bin's tokens."""
    low = tl.full((BLOCK,), HIGHEST, tl.int32)
    high = tl.full((BLOCK,), LOWEST, tl.int32)
    for first in range(0, length, BLOCK):
        _, x, inside = _listed(own, length, source, first, BLOCK)
        inside = inside & (bin_of(x, top, scale) == place)
        key = key_of(x)
        low = tl.where(inside, tl.minimum(low, key), low)
        high = tl.where(inside, tl.maximum(high, key), high)
    return tl.min(low, axis=0).to(tl.int64), tl.max(high, axis=0).to(tl.int64)


@triton.jit
def _over(own, length, source, top, scale, inverse, place, by_mass, middle, BLOCK: tl.constexpr):
    """Returns the number or the mass of a bin's tokens with a key of ``middle`` or more; the
    smallest key among those; and the largest key among the others."""
    total = tl.zeros((BLOCK,), tl.int64)
    low = tl.full((BLOCK,), HIGHEST, tl.int32)
    high = tl.full((BLOCK,), LOWEST, tl.int32)
    for first in range(0, length, BLOCK):
        _, x, inside = _listed(own, length, source, first, BLOCK)
        inside = inside & (bin_of(x, top, scale) == place)
        key = key_of(x)
        over = inside & (key >= middle)
        amount = tl.where(by_mass, mass_of(weight_of(x, top, inverse)), 1)
        total += tl.where(over, amount, 0)
        low = tl.where(over, tl.minimum(low, key), low)
        high = tl.where(inside & (key < middle), tl.maximum(high, key), high)
    return (
        tl.sum(total, axis=0),
        tl.min(low, axis=0).to(tl.int64),
        tl.max(high, axis=0).to(tl.int64),
    )


@triton.jit
def _kept_mass(own, length, source, top, scale, inverse, place, limit, equal, BLOCK: tl.constexpr):
    """Returns the mass of a bin's tokens above the limit, and of ``equal`` tokens at the limit."""
    total = tl.zeros((BLOCK,), tl.int64)
    for first in range(0, length, BLOCK):
        _, x, inside = _listed(own, length, source, first, BLOCK)
        over = inside & (bin_of(x, top, scale) == place) & (key_of(x) > limit)
        total += tl.where(over, mass_of(weight_of(x, top, inverse)), 0)
    each = mass_of(weight_of(float_of_key(limit.to(tl.int32)), top, inverse))
    return tl.sum(total, axis=0) + equal * each


@triton.jit
def _equals(own, length, source, limit, most, BLOCK: tl.constexpr):
    """Returns the number, the first and the last of the listed tokens up to ``most`` whose key is
    the limit."""
    there = tl.zeros((BLOCK,), tl.int64)
    low = tl.full((BLOCK,), HIGHEST, tl.int32)
    high = tl.zeros((BLOCK,), tl.int32)
    for first in range(0, length, BLOCK):
        tokens, x, inside = _listed(own, length, source, first, BLOCK)
        same = inside & (key_of(x) == limit) & (tokens <= most)
        there += same.to(tl.int64)
        low = tl.where(same, tl.minimum(low, tokens), low)
        high = tl.where(same, tl.maximum(high, tokens), high)
    return (
        tl.sum(there, axis=0),
        tl.min(low, axis=0).to(tl.int64),
        tl.max(high, axis=0).to(tl.int64),
    )


@triton.jit
def race_listed(
    own,
    length,
    source,
    top,
    inverse,
    min_p,
    limit,
    last,
    seed,
    position,
    BLOCK: tl.constexpr,
):
    """Returns the winner among the listed tokens before the cut."""
    best = tl.full((BLOCK,), NOT_FINITE, tl.int64)
    zero = tl.zeros((BLOCK,), tl.int32)
    low = zero + position.to(tl.int32)
    high = zero + (position >> 32).to(tl.int32)
    for first in range(0, length, BLOCK):
        tokens, x, inside = _listed(own, length, source, first, BLOCK)
        w, key = weight_of(x, top, inverse), key_of(x)
        kept = inside & ((key > limit) | ((key == limit) & (tokens <= last)))
        kept = kept & (w >= min_p) & (w > 0.0)
        r0, r1, r2, r3 = tl.philox(seed, tokens // 4, low, high, zero)
        lane = tokens % 4
        bits = tl.where(lane < 2, tl.where(lane == 0, r0, r1), tl.where(lane == 2, r2, r3))
        best = tl.minimum(best, race_keys(bits, w, tokens, kept))
    return tl.min(best, axis=0)
