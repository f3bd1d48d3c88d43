"""A token for each row of logits on a CPU, without sorting a vocabulary.

Each thread of the team takes whole rows. What a row needs none of is skipped: a greedy row is one
pass over its logits. Otherwise (docs/adr/0014-the-sampler.md):

1. The largest and the smallest logit, as integers in the same order; they also show whether all are
   finite.
2. Weights w = exp((x - largest) / temperature), and for each a bin of its distance to the largest.
3. top_k and top_p cut the ranking (logits falling, tokens rising among equals) after some token. A
   histogram of counts or masses says in which bin; halving the interval of that bin's own logits
   says where. Masses are integers, so their sums do not depend on an order.
4. The race: token i has the key -log(1 - v_i) / w_i, with v_i uniform in (0, 1) by Philox; the
   smallest key wins, which happens with probability w_i / Σ w.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
import torch
from numba import njit, types
from torch import Tensor

from griffin_core.backends.cpu.arithmetic import exp
from griffin_core.backends.cpu.bfloat16 import at, bits_of, float_of
from griffin_core.backends.cpu.philox import philox
from griffin_core.backends.cpu.team import FAST, Kernel, address, team_rank, team_size
from griffin_core.backends.transfers import float_bits

if TYPE_CHECKING:
    from griffin_core.sampling.params import SamplingParams

BINS = 2048
"""Number of bins of the histogram."""

BINS_PER_NAT = np.float32(64.0)
"""Bins for each factor e between weights, where weights fall further than the bins reach."""

MASS_ONE = np.float32(2.0**40)
"""The mass of the likeliest token; masses are integers. 2^18 tokens of it stay under 2^63."""

BLOCK = 64
"""Tokens that are raced at once: 16 counters of Philox, four tokens each."""

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
"""Columns of the table of slots, int64: whether the slot samples (else it is greedy), the two
limits and the seed; number and addresses of the logit biases (int64 tokens, float32 values);
address of what was seen [V] int32 (bit 0: in the prompt; the rest: times drawn), or 0; six float32
as the int32 of their bits; and number and address of the tokens (int64) that are never drawn."""

_loop = partial(
    njit, fastmath=FAST, error_model="numpy", no_cpython_wrapper=True, no_cfunc_wrapper=True
)()
_part = partial(njit, inline="always")()
"""Most of what compiling takes is saved by leaving out what calls from Python would need, and by
few levels of calls: LLVM goes over a function again in each one that calls it."""

_INFINITE = np.int32(0x7F800000)
_LARGEST = np.float32(torch.finfo(torch.float32).max)
_ALMOST_ONE = np.float32(1 - 2.0**-24)
_UNIT = np.float32(2.0**-32)


class CpuSlots:
    """What is kept for each slot, in a table of numbers and addresses. See ``Sampler``.

    Args:
        slots: S; slot S is always there and greedy.
        vocabulary: V.
    """

    def __init__(self, *, slots: int, vocabulary: int) -> None:
        self._vocabulary = vocabulary
        self.drawn = torch.zeros(slots + 1, dtype=torch.int64)
        self._table = torch.zeros((slots + 1, FIELDS), dtype=torch.int64)
        self._owned: list[tuple[Tensor, ...]] = [()] * (slots + 1)  # what the table's addresses are
        self._others: dict[int, Tensor] = {}
        """Of slots whose request allows certain tokens only: [V] bool, all other tokens."""
        self._banned: dict[int, Tensor] = {}
        self._scratch = torch.empty(0, dtype=torch.uint8)

    @property
    def nbytes(self) -> int:
        """See ``Sampler``."""
        own = sum(tensor.nbytes for tensors in self._owned for tensor in tensors)
        own += sum(t.nbytes for slots in (self._others, self._banned) for t in slots.values())
        return own + self._table.nbytes + self.drawn.nbytes

    @property
    def in_use(self) -> frozenset[int]:
        """See ``Sampler``."""
        rows = self._table.any(dim=1).nonzero()[:, 0].tolist()
        owned = (slot for slot, tensors in enumerate(self._owned) if tensors)
        return frozenset((*rows, *owned, *self._others, *self._banned))

    def open(self, slot: int, params: SamplingParams, seen: Sequence[int]) -> None:
        """See ``Sampler``."""
        self.close(slot)
        if not params.plain:  # which is what zeros say
            self._open(slot, params, seen)
        if params.allowed_token_ids:
            others = torch.ones(self._vocabulary, dtype=torch.bool)
            others[list(params.allowed_token_ids)] = False
            self._others[slot] = others
            self.ban(slot, ())

    def _open(self, slot: int, params: SamplingParams, seen: Sequence[int]) -> None:
        tokens = torch.tensor(list(params.logit_bias), dtype=torch.int64)
        values = torch.tensor(list(params.logit_bias.values()), dtype=torch.float32)
        counts = None
        if params.penalizes:
            counts = torch.zeros(self._vocabulary, dtype=torch.int32)
            counts[torch.tensor(list(seen), dtype=torch.int64)] = 1
        self._owned[slot] = (tokens, values) if counts is None else (tokens, values, counts)
        row = {
            SAMPLES: int(params.temperature > 0),
            TOP_K: params.top_k if params.top_k < self._vocabulary else 0,
            SEED: params.seed - (params.seed >> 63 << 64),  # its bits, as signed
            BIASES: len(tokens),
            BIAS_TOKENS: address(tokens),
            BIAS_VALUES: address(values),
            SEEN: address(counts),
            INVERSE_TEMPERATURE: float_bits(params.inverse_temperature),
            TOP_P: float_bits(params.top_p),
            MIN_P: float_bits(params.min_p),
            REPETITION: float_bits(params.repetition_penalty),
            PRESENCE: float_bits(params.presence_penalty),
            FREQUENCY: float_bits(params.frequency_penalty),
            BANS: 0,
            BAN_TOKENS: 0,
        }
        self._table[slot] = torch.tensor([row[field] for field in range(FIELDS)])

    def ban(self, slot: int, tokens: Sequence[int]) -> None:
        """See ``Sampler``."""
        banned = torch.tensor(tokens, dtype=torch.int64)
        if slot in self._others:
            others = self._others[slot].clone()
            others[banned] = True
            banned = others.nonzero()[:, 0]
        self._banned[slot] = banned
        self._table[slot, BANS] = len(banned)
        self._table[slot, BAN_TOKENS] = address(banned)

    def close(self, slot: int) -> None:
        """See ``Sampler``."""
        self._table[slot] = 0
        self._owned[slot] = ()
        self._others.pop(slot, None)
        self._banned.pop(slot, None)

    def sample(self, logits: Tensor, slots: Tensor, positions: Tensor) -> Tensor:
        """See ``Sampler``."""
        if not _sample.compiled and not self._table[slots].any():
            # So that a process which is asked for nothing else does not compile the loops.
            tokens = logits.argmax(dim=1).masked_fill(~logits.isfinite().all(dim=1), -1)
            self.drawn[slots] = tokens
            return tokens
        rows, vocabulary = logits.shape
        threads = max(1, min(rows, torch.get_num_threads()))
        padded = -(-vocabulary // BLOCK) * BLOCK
        # Of each thread: logits with penalties, weights, bins and a list of tokens; the histogram;
        # a block of random numbers.
        size = 16 * padded + 8 * BINS + 4 * BLOCK
        if self._scratch.numel() < threads * size:
            self._scratch = torch.empty(threads * size, dtype=torch.uint8)
        tokens = torch.empty(rows, dtype=torch.int64)
        _sample(
            logits.data_ptr(),
            slots.data_ptr(),
            positions.data_ptr(),
            self._table.data_ptr(),
            tokens.data_ptr(),
            self.drawn.data_ptr(),
            self._scratch.data_ptr(),
            size,
            rows,
            vocabulary,
            threads=threads,
        )
        return tokens


@Kernel
def _sample(a):
    slots, positions = at(a[1], types.int64), at(a[2], types.int64)
    tokens, drawn = at(a[4], types.int64), at(a[5], types.int64)
    rank, size, rows, vocabulary = team_rank(), team_size(), a[8], a[9]
    for row in range(rank, rows, size):
        slot = slots[row]
        settings = a[3] + 8 * FIELDS * slot
        token = _draw(
            a[0] + 4 * vocabulary * row, settings, positions[row], a[6] + a[7] * rank, vocabulary
        )
        tokens[row] = token
        drawn[slot] = token


@_part
def _draw(logits, settings, position, scratch, size):
    """One row's token; counts it as seen."""
    own = at(settings, types.int64)
    x = at(logits, types.float32)
    largest, smallest = _extremes(at(logits, types.int32), size)
    token = types.int64(-1)
    if largest < _INFINITE and smallest > -_INFINITE - 1:
        if own[BIASES] != 0 or own[SEEN] != 0 or own[BANS] != 0:
            _shape(x, at(scratch, types.float32), settings, size)
            x = at(scratch, types.float32)
            largest, smallest = _extremes(at(scratch, types.int32), size)
        top = _float_of_key(largest)
        if own[SAMPLES] != 0:
            token = _sampled(x, top, _float_of_key(smallest), settings, position, scratch, size)
        else:
            token = _first(x, top)
        if own[SEEN] != 0:
            at(own[SEEN], types.int32)[token] += types.int32(2)
    return token


@_part
def _sampled(x, top, bottom, settings, position, scratch, size):
    own = at(settings, types.int64)
    padded = (size + BLOCK - 1) // BLOCK * BLOCK
    w = at(scratch + 4 * padded, types.float32)
    inverse = _float(own[INVERSE_TEMPERATURE])
    top_k, top_p = own[TOP_K], _float(own[TOP_P])
    _weigh(x, w, top, inverse, size, padded)
    banned = at(own[BAN_TOKENS], types.int64)
    for i in range(own[BANS]):  # at the highest temperatures no distance makes the weight 0
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
    return _race(
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
    """Bits of a float32 -> an int32 in the same order, with -0 before 0."""
    return types.int32(bits ^ ((bits >> types.int32(31)) & types.int32(0x7FFFFFFF)))


@_part
def _float_of_key(key):
    return float_of(_key(key))  # its own inverse


@_part
def _key_of(x):
    """A key in which 0 is -0."""
    return types.int64(_key(types.int32(bits_of(x)))) if x != np.float32(0.0) else types.int64(0)


@_part
def _mass_of(weight):
    return types.int64(weight * MASS_ONE)


@_loop
def _extremes(bits, size):
    """Largest and smallest key. Integers, since LLVM makes no vectors of a maximum of floats that
    may be NaN."""
    largest, smallest = types.int32(-0x80000000), types.int32(0x7FFFFFFF)
    for i in range(size):
        key = _key(bits[i])
        largest = max(largest, key)
        smallest = min(smallest, key)
    return largest, smallest


@_loop
def _first(x, value):
    """Where it stands first; it must be there."""
    i = types.int64(0)
    while x[i] != value:
        i += 1
    return i


@_loop
def _shape(x, shaped, settings, size):
    """shaped = x with biases and penalties, finite but for the -infinity of banned tokens."""
    own = at(settings, types.int64)
    for i in range(size):
        shaped[i] = x[i]
    tokens, values = at(own[BIAS_TOKENS], types.int64), at(own[BIAS_VALUES], types.float32)
    for i in range(own[BIASES]):
        y = shaped[tokens[i]] + values[i]
        shaped[tokens[i]] = min(max(y, -_LARGEST), _LARGEST)
    if own[SEEN] != 0:
        seen = at(own[SEEN], types.int32)
        repetition, presence = _float(own[REPETITION]), _float(own[PRESENCE])
        frequency = _float(own[FREQUENCY])
        for i in range(size):
            y = shaped[i]
            repeated = y / repetition if y > np.float32(0.0) else y * repetition
            y = repeated if seen[i] != 0 else y
            times = seen[i] >> types.int32(1)
            y -= presence if times > 0 else np.float32(0.0)
            y -= frequency * types.float32(times)
            shaped[i] = min(max(y, -_LARGEST), _LARGEST)
    banned = at(own[BAN_TOKENS], types.int64)
    for i in range(own[BANS]):
        shaped[banned[i]] = -np.float32(np.inf)


@_loop
def _weigh(x, w, top, inverse, size, padded):
    for i in range(size):
        # Clipped before the product, for 0 · infinity is NaN.
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
    """Leaves in ``chosen`` the tokens of the bin in which so many, or so much mass, is reached.

    Returns:
        How many they are, and what is still wanted of them.
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
    """Weights after the cut become 0. It is among the chosen tokens, where so many, or so much
    mass, is reached: an interval of keys, whose ends are always keys of tokens there, is halved."""
    chosen = at(chosen_at, types.int32)
    low, high = types.int64(0x7FFFFFFF), types.int64(-0x80000000)
    for j in range(count):
        key = _key_of(x[chosen[j]])
        low, high = min(low, key), max(high, key)
    above = types.int64(0)  # what lies over the interval
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
    for j in range(count):  # of equals the first ones stay
        i = chosen[j]
        if x[i] == limit:
            if wanted <= 0:
                w[i] = np.float32(0.0)
            wanted -= _mass_of(w[i]) if by_mass != 0 else types.int64(1)


@_loop
def _race(w, padded, min_p, seed, position, scratch):
    """The token whose key is smallest, the first of equals, among those of weight min_p or more."""
    v = at(scratch, types.float32)
    k0, k1 = types.uint32(seed), types.uint32(seed >> 32)
    c1, c2 = types.uint32(position), types.uint32(position >> 32)
    least = max(min_p, np.float32(1e-45))
    best, token = np.float32(np.inf), types.int64(-1)
    for begin in range(0, padded, BLOCK):
        kept = types.int32(0)
        for i in range(BLOCK):
            kept |= types.int32(w[begin + i] >= least)
        if kept == 0:
            continue
        for g in range(BLOCK // 4):
            counter = types.uint32(begin // 4 + g)
            r0, r1, r2, r3 = philox(counter, c1, c2, types.uint32(0), k0, k1)
            v[4 * g] = _unit(r0)
            v[4 * g + 1] = _unit(r1)
            v[4 * g + 2] = _unit(r2)
            v[4 * g + 3] = _unit(r3)
        # -log(1 - v) >= v: what is not below the best without the logarithm is not with it.
        faster = types.int32(0)
        for i in range(BLOCK):
            faster |= types.int32(v[i] < best * w[begin + i])
        if faster == 0:
            continue
        for i in range(BLOCK):
            if w[begin + i] >= least:
                key = _exponential(v[i]) / w[begin + i]
                if key < best:
                    best, token = key, types.int64(begin + i)
    return token


@_part
def _unit(bits):
    return min((types.float32(bits) + np.float32(0.5)) * _UNIT, _ALMOST_ONE)


@_part
def _exponential(v):
    """-log(1 - v), by its series where 1 - v would lose digits."""
    if v < np.float32(1 / 64):
        third = np.float32(1 / 3)
        series = v * (np.float32(0.5) + v * (third + v * np.float32(0.25)))
        return v * (np.float32(1.0) + series)
    return -np.log(np.float32(1.0) - v)
