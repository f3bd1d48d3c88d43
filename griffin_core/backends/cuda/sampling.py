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

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl
from torch import Tensor

from griffin_core.backends.cuda.tuning import pdl_options, pdl_wait
from griffin_core.backends.transfers import float_bits

if TYPE_CHECKING:
    from griffin_core.sampling.params import SamplingParams

BLOCK = 1024
MOST_SPLITS = 32
"""The most programs that share a row. For a vocabulary of 128,256 each has about 4,000 tokens, so
one row occupies a quarter of an H100, and four rows all of it."""

FIELDS = 16
"""The number of columns of the table of slots, int32; the last six in use hold float32 bits."""

_SAMPLES: tl.constexpr = tl.constexpr(0)
_BIASED: tl.constexpr = tl.constexpr(1)
_PENALIZED: tl.constexpr = tl.constexpr(2)
_TOP_K: tl.constexpr = tl.constexpr(3)
_SEED_LOW: tl.constexpr = tl.constexpr(4)
_SEED_HIGH: tl.constexpr = tl.constexpr(5)
_INVERSE_TEMPERATURE: tl.constexpr = tl.constexpr(6)
_TOP_P: tl.constexpr = tl.constexpr(7)
_MIN_P: tl.constexpr = tl.constexpr(8)
_REPETITION: tl.constexpr = tl.constexpr(9)
_PRESENCE: tl.constexpr = tl.constexpr(10)
_FREQUENCY: tl.constexpr = tl.constexpr(11)
_WIDTH: tl.constexpr = tl.constexpr(FIELDS)

_BINS: tl.constexpr = tl.constexpr(1024)
_BINS_PER_NAT: tl.constexpr = tl.constexpr(32.0)
_MASS_ONE: tl.constexpr = tl.constexpr(2.0**40)
"""The mass of the most likely token."""

_LARGEST: tl.constexpr = tl.constexpr(3.4028234663852886e38)
_INFINITE: tl.constexpr = tl.constexpr(0x7F800000)
_NOT_FINITE: tl.constexpr = tl.constexpr(0x7FFFFFFFFFFFFFFF)
_LOWEST: tl.constexpr = tl.constexpr(-0x80000000)
_HIGHEST: tl.constexpr = tl.constexpr(0x7FFFFFFF)


class CudaSlots:
    """The sampling state of each slot, on the device at fixed addresses. See ``Sampler``.

    Args:
        slots: S, the number of sessions; slot S always exists and is greedy.
        vocabulary: V.
    """

    def __init__(self, *, slots: int, vocabulary: int, device: torch.device) -> None:
        self._device = device
        self._vocabulary = vocabulary
        self.drawn = torch.zeros(slots + 1, dtype=torch.int64, device=device)
        self._table = torch.zeros((slots + 1, FIELDS), dtype=torch.int32, device=device)
        self._bias = torch.zeros((slots + 1, vocabulary), dtype=torch.float32, device=device)
        self._seen = torch.zeros((slots + 1, vocabulary), dtype=torch.int32, device=device)
        """Bit 0: in the prompt. The other bits: times drawn."""
        self._params: dict[int, SamplingParams] = {}

    @property
    def nbytes(self) -> int:
        """See ``Sampler``."""
        return self._bias.nbytes + self._seen.nbytes + self._table.nbytes + self.drawn.nbytes

    @property
    def in_use(self) -> frozenset[int]:
        """See ``Sampler``."""
        rows = self._table.any(dim=1).nonzero()[:, 0].tolist()
        return frozenset((*rows, *self._params))

    def open(self, slot: int, params: SamplingParams, seen: Sequence[int]) -> None:
        """See ``Sampler``."""
        self._params[slot] = params
        biased = self._write_bias(slot, ())
        if params.penalizes:
            self._seen[slot].zero_()
            self._seen[slot].index_fill_(0, self._sent(list(seen)), 1)
        numbers = [
            int(params.temperature > 0),
            int(biased),
            int(params.penalizes),
            params.top_k if params.top_k < self._vocabulary else 0,
            _signed(params.seed & 0xFFFFFFFF),
            _signed(params.seed >> 32),
            float_bits(params.inverse_temperature),
            float_bits(params.top_p),
            float_bits(params.min_p),
            float_bits(params.repetition_penalty),
            float_bits(params.presence_penalty),
            float_bits(params.frequency_penalty),
        ]
        numbers += [0] * (FIELDS - len(numbers))
        self._table[slot].copy_(self._sent(numbers, torch.int32))

    def ban(self, slot: int, tokens: Sequence[int]) -> None:
        """See ``Sampler``."""
        self._table[slot, _BIASED.value].fill_(int(self._write_bias(slot, tokens)))

    def _write_bias(self, slot: int, banned: Sequence[int]) -> bool:
        """Writes the values that are added to a slot's logits; -infinity for tokens that are never
        drawn. Returns whether the slot has any."""
        params, row = self._params[slot], self._bias[slot]
        if not (params.logit_bias or params.allowed_token_ids or banned):
            return False
        row.fill_(-torch.inf if params.allowed_token_ids else 0.0)
        row.index_fill_(0, self._sent(list(params.allowed_token_ids)), 0.0)
        values = self._sent(list(params.logit_bias.values()), torch.float32)
        row.index_add_(0, self._sent(list(params.logit_bias)), values)
        row.index_fill_(0, self._sent(banned), -torch.inf)
        return True

    def close(self, slot: int) -> None:
        """See ``Sampler``."""
        self._table[slot].zero_()
        self._params.pop(slot, None)

    def sample(self, logits: Tensor, slots: Tensor, positions: Tensor) -> Tensor:
        """See ``Sampler``. Scratch memory is allocated here: during a capture it comes from the
        graph's pool, which graphs share."""
        rows, vocabulary = logits.shape
        splits = min(MOST_SPLITS, triton.next_power_of_2(triton.cdiv(vocabulary, 4 * BLOCK)))
        processed = torch.empty_like(logits)
        listed = logits.new_empty((rows, vocabulary), dtype=torch.int32)
        lengths = slots.new_empty(rows, dtype=torch.int32)
        counts = slots.new_empty((rows, _BINS.value), dtype=torch.int32)
        masses = slots.new_empty((rows, _BINS.value))
        tops, bests = slots.new_empty((rows, splits)), slots.new_empty((rows, splits))
        bottoms = slots.new_empty((rows, splits), dtype=torch.int32)
        tokens = slots.new_empty(rows)
        options = {"SPLITS": splits, "BLOCK": BLOCK, **pdl_options()}
        _process_logits[rows, splits](
            logits,
            slots,
            self._table,
            self._bias,
            self._seen,
            processed,
            tops,
            bottoms,
            counts,
            masses,
            lengths,
            vocabulary,
            **options,
        )
        row = (logits, processed, slots, self._table, tops, bottoms, counts, masses, lengths)
        _count[rows, splits](*row, vocabulary, **options)
        _race[rows, splits](*row, listed, positions, bests, vocabulary, **options)
        _finish[rows,](
            *row,
            listed,
            positions,
            bests,
            self._seen,
            self.drawn,
            tokens,
            vocabulary,
            **options,
        )
        return tokens

    def _sent(self, values: Sequence[float], dtype: torch.dtype = torch.int64) -> Tensor:
        """Copies values to the device in stream order, without waiting."""
        host = torch.tensor(values, dtype=dtype)
        if self._device.type != "cuda":
            return host
        return host.pin_memory().to(self._device, non_blocking=True)


def _signed(bits: int) -> int:
    return bits - (bits >> 31 << 32)


# -- small pieces --------------------------------------------------------------------------------


@triton.jit
def _number(table, slot, FIELD: tl.constexpr):
    return tl.load(table + slot * _WIDTH + FIELD)


@triton.jit
def _float(table, slot, FIELD: tl.constexpr):
    return _number(table, slot, FIELD).to(tl.float32, bitcast=True)


@triton.jit
def _key_of(x):
    """Maps a float32 to an int32 in the same order; 0 and -0 have the same key."""
    bits = x.to(tl.int32, bitcast=True)
    return tl.where(x == 0.0, 0, bits ^ ((bits >> 31) & 0x7FFFFFFF))


@triton.jit
def _float_of(key):
    return (key ^ ((key >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def _top(tops, row, SPLITS: tl.constexpr):
    """Returns the row's largest logit: its key in the upper half, 2^31 - 1 - its first token in the
    lower half."""
    return tl.max(tl.load(tops + row * SPLITS + tl.arange(0, SPLITS)), axis=0)


@triton.jit
def _scale(bottoms, row, top, inverse, SPLITS: tl.constexpr):
    """Returns the number of bins per unit of distance to the largest logit."""
    bottom = _float_of(tl.min(tl.load(bottoms + row * SPLITS + tl.arange(0, SPLITS)), axis=0))
    spread = tl.minimum(tl.maximum(top - bottom, 1e-30), _LARGEST)
    least = tl.full((), _BINS - 1, tl.float32) / spread
    return tl.minimum(tl.maximum(least, inverse * _BINS_PER_NAT), _LARGEST)


@triton.jit
def _distance(x, top):
    return tl.minimum(top - x, _LARGEST)  # clipped: 0 · infinity is NaN


@triton.jit
def _weight(x, top, inverse):
    distance = _distance(x, top) * inverse
    # A banned token has weight 0 at any temperature.
    return tl.where((distance < 87.0) & (x >= -_LARGEST), tl.exp(-distance), 0.0)


@triton.jit
def _bin(x, top, scale):
    return tl.minimum(_distance(x, top) * scale, _BINS - 1.0).to(tl.int32)


@triton.jit
def _mass(w):
    return (w * _MASS_ONE).to(tl.int64)


@triton.jit
def _wanted_mass(top_p, mass):
    share = (top_p.to(tl.float64) * mass.to(tl.float64)).to(tl.int64)
    return tl.maximum(share, 1)


@triton.jit
def _raced(bits, w, tokens, kept):
    """Returns keys of the race in the upper half and tokens in the lower half; the largest int64 if
    not kept."""
    v = tl.minimum((bits.to(tl.float32) + 0.5) * 2.3283064365386963e-10, 0.99999994)
    series = v * (0.5 + v * (0.3333333333333333 + v * 0.25))
    waited = tl.where(v < 0.015625, v * (1.0 + series), -tl.log(1.0 - v))
    key = (waited / tl.where(kept, w, 1.0)).to(tl.int32, bitcast=True).to(tl.int64)
    return tl.where(kept, (key << 32) | tokens.to(tl.int64), _NOT_FINITE)


@triton.jit
def _seed(table, slot):
    low = _number(table, slot, _SEED_LOW).to(tl.int64) & 0xFFFFFFFF
    return low | (_number(table, slot, _SEED_HIGH).to(tl.int64) << 32)


@triton.jit
def _row_of(logits, processed, table, slot, row, vocabulary):
    """Returns a pointer to the row of logits, after biases and penalties if it has any."""
    own = (_number(table, slot, _BIASED) != 0) | (_number(table, slot, _PENALIZED) != 0)
    offset = row * vocabulary
    return processed + offset if own else logits + offset


# -- launches ------------------------------------------------------------------------------------


@triton.jit
def _process_logits(
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
    vocabulary,
    SPLITS: tl.constexpr,
    BLOCK: tl.constexpr,
    OVERLAPS: tl.constexpr,
):
    pdl_wait(OVERLAPS)
    row, split = tl.program_id(0).to(tl.int64), tl.program_id(1)
    slot = tl.load(slots + row)
    biased, penalized = _number(table, slot, _BIASED), _number(table, slot, _PENALIZED)
    repetition = _float(table, slot, _REPETITION)
    presence, frequency = _float(table, slot, _PRESENCE), _float(table, slot, _FREQUENCY)
    share = tl.cdiv(tl.cdiv(vocabulary, SPLITS), BLOCK) * BLOCK
    begin = split * share
    end = tl.minimum(begin + share, vocabulary)
    best = tl.full((BLOCK,), _LOWEST, tl.int64) << 32
    lowest = tl.full((BLOCK,), _HIGHEST, tl.int32)
    bad = tl.zeros((BLOCK,), tl.int32)
    for first in range(begin, end, BLOCK):
        tokens = first + tl.arange(0, BLOCK)
        inside = tokens < end
        x = tl.load(logits + row * vocabulary + tokens, mask=inside, other=0.0)
        size = x.to(tl.int32, bitcast=True) & 0x7FFFFFFF
        bad = tl.maximum(bad, (size >= _INFINITE).to(tl.int32))
        banned = tl.zeros((BLOCK,), tl.int32)
        if biased != 0:
            added = tl.load(bias + slot * vocabulary + tokens, mask=inside, other=0.0)
            banned = (added < -_LARGEST).to(tl.int32)
            x += added
        if penalized != 0:
            known = tl.load(seen + slot * vocabulary + tokens, mask=inside, other=0)
            repeated = tl.where(x > 0.0, tl.div_rn(x, repetition), x * repetition)
            x = tl.where(known != 0, repeated, x)
            times = known >> 1
            x -= tl.where(times > 0, presence, 0.0)
            x -= frequency * times.to(tl.float32)
        if (biased != 0) | (penalized != 0):
            x = tl.minimum(tl.maximum(x, -_LARGEST), _LARGEST)
            x = tl.where(banned != 0, float("-inf"), x)
            tl.store(processed + row * vocabulary + tokens, x, mask=inside)
        key = _key_of(x)
        packed = (key.to(tl.int64) << 32) | (tokens ^ 0x7FFFFFFF).to(tl.int64)
        best = tl.where(inside, tl.maximum(best, packed), best)
        lowest = tl.where(inside, tl.minimum(lowest, key), lowest)
    top = tl.where(tl.max(bad, axis=0) != 0, _NOT_FINITE, tl.max(best, axis=0))
    tl.store(tops + row * SPLITS + split, top)
    tl.store(bottoms + row * SPLITS + split, tl.min(lowest, axis=0))
    # Clears the buffers of the next launches.
    bins = split * (_BINS // SPLITS) + tl.arange(0, _BINS // SPLITS)
    tl.store(counts + row * _BINS + bins, 0)
    tl.store(masses + row * _BINS + bins, 0)
    if split == 0:
        tl.store(lengths + row, 0)


@triton.jit
def _count(
    logits,
    processed,
    slots,
    table,
    tops,
    bottoms,
    counts,
    masses,
    lengths,
    vocabulary,
    SPLITS: tl.constexpr,
    BLOCK: tl.constexpr,
    OVERLAPS: tl.constexpr,
):
    pdl_wait(OVERLAPS)
    row, split = tl.program_id(0).to(tl.int64), tl.program_id(1)
    slot = tl.load(slots + row)
    by_count = _number(table, slot, _TOP_K) != 0
    by_mass = _float(table, slot, _TOP_P) < 1.0
    if (_number(table, slot, _SAMPLES) != 0) & (by_count | by_mass):
        inverse = _float(table, slot, _INVERSE_TEMPERATURE)
        top = _float_of((_top(tops, row, SPLITS) >> 32).to(tl.int32))
        scale = _scale(bottoms, row, top, inverse, SPLITS)
        source = _row_of(logits, processed, table, slot, row, vocabulary)
        share = tl.cdiv(tl.cdiv(vocabulary, SPLITS), BLOCK) * BLOCK
        begin = split * share
        end = tl.minimum(begin + share, vocabulary)
        for first in range(begin, end, BLOCK):
            tokens = first + tl.arange(0, BLOCK)
            inside = tokens < end
            x = tl.load(source + tokens, mask=inside, other=0.0)
            at = row * _BINS + tl.where(inside, _bin(x, top, scale), 0)
            if by_count:
                tl.atomic_add(counts + at, 1, mask=inside, sem="relaxed")
            if by_mass:
                mass = _mass(_weight(x, top, inverse))
                tl.atomic_add(masses + at, mass, mask=inside & (mass > 0), sem="relaxed")


@triton.jit
def _race(
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
    vocabulary,
    SPLITS: tl.constexpr,
    BLOCK: tl.constexpr,
    OVERLAPS: tl.constexpr,
):
    pdl_wait(OVERLAPS)
    row, split = tl.program_id(0).to(tl.int64), tl.program_id(1)
    slot = tl.load(slots + row)
    if _number(table, slot, _SAMPLES) != 0:
        top_k, top_p = _number(table, slot, _TOP_K), _float(table, slot, _TOP_P)
        min_p = _float(table, slot, _MIN_P)
        inverse = _float(table, slot, _INVERSE_TEMPERATURE)
        top = _float_of((_top(tops, row, SPLITS) >> 32).to(tl.int32))
        scale = _scale(bottoms, row, top, inverse, SPLITS)
        source = _row_of(logits, processed, table, slot, row, vocabulary)
        # Bins before ``sure`` are kept. The cut is in one of the bins [sure, unsure). The cut of
        # top_k, which determines the total mass that top_p is a share of, is in bin ``counted``.
        sure = tl.full((), _BINS, tl.int32)
        unsure, counted = sure, sure
        bins = row * _BINS + tl.arange(0, _BINS)
        if top_k != 0:
            counted = tl.sum((tl.cumsum(tl.load(counts + bins), axis=0) < top_k).to(tl.int32))
            sure, unsure = counted, counted + 1
        if top_p < 1.0:
            mass = tl.load(masses + bins)
            upto = tl.cumsum(mass, axis=0)
            order = tl.arange(0, _BINS)
            least = tl.sum(tl.where(order < counted, mass, 0))
            most = tl.sum(tl.where(order <= counted, mass, 0))
            sure = tl.sum((upto < _wanted_mass(top_p, least)).to(tl.int32))
            last = tl.sum((upto < _wanted_mass(top_p, most)).to(tl.int32))
            unsure = tl.minimum(last, counted) + 1
        position = tl.load(positions + row)
        seed = _seed(table, slot)
        zero = tl.zeros((BLOCK // 4,), tl.int32)
        low = zero + position.to(tl.int32)
        high = zero + (position >> 32).to(tl.int32)
        best = tl.full((BLOCK,), _NOT_FINITE, tl.int64)
        share = tl.cdiv(tl.cdiv(vocabulary, SPLITS), BLOCK) * BLOCK
        begin = split * share
        end = tl.minimum(begin + share, vocabulary)
        for first in range(begin, end, BLOCK):
            tokens = first + tl.arange(0, BLOCK)
            inside = tokens < end
            x = tl.load(source + tokens, mask=inside, other=0.0)
            w = _weight(x, top, inverse)
            place = _bin(x, top, scale)
            kept = inside & (place < sure) & (w >= min_p) & (w > 0.0)
            open_ = inside & (((place >= sure) & (place < unsure)) | (place == counted))
            open_ = open_ & (sure < _BINS)
            both = tl.sum(kept.to(tl.int32) + (open_.to(tl.int32) << 16), axis=0)
            if both >= 65536:
                at = tl.atomic_add(lengths + row, both >> 16, sem="relaxed")
                at += tl.cumsum(open_.to(tl.int32), axis=0) - 1
                tl.store(listed + row * vocabulary + at, tokens, mask=open_)
            if (both & 65535) != 0:
                counters = first // 4 + tl.arange(0, BLOCK // 4)
                r0, r1, r2, r3 = tl.philox(seed, counters, low, high, zero)
                bits = tl.interleave(tl.interleave(r0, r2), tl.interleave(r1, r3))
                best = tl.minimum(best, _raced(bits, w, tokens, kept))
        tl.store(bests + row * SPLITS + split, tl.min(best, axis=0))


@triton.jit
def _finish(
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
    vocabulary,
    SPLITS: tl.constexpr,
    BLOCK: tl.constexpr,
    OVERLAPS: tl.constexpr,
):
    pdl_wait(OVERLAPS)
    row = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots + row)
    packed = _top(tops, row, SPLITS)
    token = (packed & 0xFFFFFFFF) ^ 0x7FFFFFFF
    if packed == _NOT_FINITE:
        token = tl.full((), -1, tl.int64)
    elif _number(table, slot, _SAMPLES) != 0:
        best = tl.min(tl.load(bests + row * SPLITS + tl.arange(0, SPLITS)), axis=0)
        top_k, top_p = _number(table, slot, _TOP_K), _float(table, slot, _TOP_P)
        if (top_k != 0) | (top_p < 1.0):
            inverse = _float(table, slot, _INVERSE_TEMPERATURE)
            top = _float_of((packed >> 32).to(tl.int32))
            scale = _scale(bottoms, row, top, inverse, SPLITS)
            source = _row_of(logits, processed, table, slot, row, vocabulary)
            own, length = listed + row * vocabulary, tl.load(lengths + row)
            count = tl.load(counts + row * _BINS + tl.arange(0, _BINS)).to(tl.int64)
            mass = tl.load(masses + row * _BINS + tl.arange(0, _BINS))
            limit, last = _cut(
                own, length, source, count, mass, top, scale, inverse, top_k, top_p, BLOCK
            )
            found = _race_listed(
                own,
                length,
                source,
                top,
                inverse,
                _float(table, slot, _MIN_P),
                limit,
                last,
                _seed(table, slot),
                tl.load(positions + row),
                BLOCK,
            )
            best = tl.minimum(best, found)
        token = best & 0xFFFFFFFF
    tl.store(out + row, token)
    tl.store(drawn + slot, token)
    if (token >= 0) & (_number(table, slot, _PENALIZED) != 0):
        at = seen + slot * vocabulary + token
        tl.store(at, tl.load(at) + 2)


@triton.jit
def _cut(own, length, source, count, mass, top, scale, inverse, top_k, top_p, BLOCK: tl.constexpr):
    """Finds the cut in the ranking. Returns the key of the last logit that is kept, and the last
    token that is kept among those equal to it. top_k cuts first, then top_p cuts what is left.

    Args:
        own, length: the listed tokens.
        count, mass: [_BINS] int64, over all tokens.
    """
    order = tl.arange(0, _BINS)
    limit, last = tl.full((), _LOWEST, tl.int64), tl.full((), _HIGHEST, tl.int64)
    equal = tl.full((), 0, tl.int64)
    total = tl.sum(mass, axis=0)
    for stage in range(2):
        by_mass = stage == 1
        if (by_mass & (top_p < 1.0)) | ((stage == 0) & (top_k != 0)):
            amounts = tl.where(by_mass, mass, count)
            wanted = tl.where(by_mass, _wanted_mass(top_p, total), top_k.to(tl.int64))
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
                each = tl.maximum(_mass(_weight(_float_of(limit.to(tl.int32)), top, inverse)), 1)
            equal = (wanted - above + each - 1) // each
            kept = tl.sum(tl.where(order < place, mass, 0), axis=0)
            total = kept + _kept_mass(
                own, length, source, top, scale, inverse, place, limit, equal, BLOCK
            )
    # Among equals the first tokens stay.
    there, first, final = _equals(own, length, source, limit, _HIGHEST, BLOCK)
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
    low = tl.full((BLOCK,), _HIGHEST, tl.int32)
    high = tl.full((BLOCK,), _LOWEST, tl.int32)
    for first in range(0, length, BLOCK):
        _, x, inside = _listed(own, length, source, first, BLOCK)
        inside = inside & (_bin(x, top, scale) == place)
        key = _key_of(x)
        low = tl.where(inside, tl.minimum(low, key), low)
        high = tl.where(inside, tl.maximum(high, key), high)
    return tl.min(low, axis=0).to(tl.int64), tl.max(high, axis=0).to(tl.int64)


@triton.jit
def _over(own, length, source, top, scale, inverse, place, by_mass, middle, BLOCK: tl.constexpr):
    """Returns the number or the mass of a bin's tokens with a key of ``middle`` or more; the
    smallest key among those; and the largest key among the others."""
    total = tl.zeros((BLOCK,), tl.int64)
    low = tl.full((BLOCK,), _HIGHEST, tl.int32)
    high = tl.full((BLOCK,), _LOWEST, tl.int32)
    for first in range(0, length, BLOCK):
        _, x, inside = _listed(own, length, source, first, BLOCK)
        inside = inside & (_bin(x, top, scale) == place)
        key = _key_of(x)
        over = inside & (key >= middle)
        amount = tl.where(by_mass, _mass(_weight(x, top, inverse)), 1)
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
        over = inside & (_bin(x, top, scale) == place) & (_key_of(x) > limit)
        total += tl.where(over, _mass(_weight(x, top, inverse)), 0)
    each = _mass(_weight(_float_of(limit.to(tl.int32)), top, inverse))
    return tl.sum(total, axis=0) + equal * each


@triton.jit
def _equals(own, length, source, limit, most, BLOCK: tl.constexpr):
    """Returns the number, the first and the last of the listed tokens up to ``most`` whose key is
    the limit."""
    there = tl.zeros((BLOCK,), tl.int64)
    low = tl.full((BLOCK,), _HIGHEST, tl.int32)
    high = tl.zeros((BLOCK,), tl.int32)
    for first in range(0, length, BLOCK):
        tokens, x, inside = _listed(own, length, source, first, BLOCK)
        same = inside & (_key_of(x) == limit) & (tokens <= most)
        there += same.to(tl.int64)
        low = tl.where(same, tl.minimum(low, tokens), low)
        high = tl.where(same, tl.maximum(high, tokens), high)
    return (
        tl.sum(there, axis=0),
        tl.min(low, axis=0).to(tl.int64),
        tl.max(high, axis=0).to(tl.int64),
    )


@triton.jit
def _race_listed(
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
    best = tl.full((BLOCK,), _NOT_FINITE, tl.int64)
    zero = tl.zeros((BLOCK,), tl.int32)
    low = zero + position.to(tl.int32)
    high = zero + (position >> 32).to(tl.int32)
    for first in range(0, length, BLOCK):
        tokens, x, inside = _listed(own, length, source, first, BLOCK)
        w, key = _weight(x, top, inverse), _key_of(x)
        kept = inside & ((key > limit) | ((key == limit) & (tokens <= last)))
        kept = kept & (w >= min_p) & (w > 0.0)
        r0, r1, r2, r3 = tl.philox(seed, tokens // 4, low, high, zero)
        lane = tokens % 4
        bits = tl.where(lane < 2, tl.where(lane == 0, r0, r1), tl.where(lane == 2, r2, r3))
        best = tl.minimum(best, _raced(bits, w, tokens, kept))
    return tl.min(best, axis=0)
