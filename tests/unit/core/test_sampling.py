"""The batched sampler on a CPU, against a float64 reference that sorts; and that reference against
transformers' own processors where it has them."""

from __future__ import annotations

import itertools
import math
import subprocess
import sys
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from numba import njit
from torch import Tensor
from transformers import (
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from griffin_core.backends.cpu.philox import philox
from griffin_core.backends.cpu.team import Kernel
from griffin_core.backends.select import backend_for
from griffin_core.errors import InvalidRequest
from griffin_core.sampling.logprobs import logprobs_of
from griffin_core.sampling.params import LARGEST_SEED, SamplingParams
from griffin_core.sampling.sampler import Sampler
from tests.reference_sampler import chi_square, probabilities

V = 500
CPU_BACKEND = backend_for(torch.device("cpu"), torch.float32)
DRAWS = [2_000, pytest.param(100_000, marks=pytest.mark.slow)]
ALWAYS = 300.0
"""Added to a logit, it makes a token certain."""


def sampler_for(
    *requests: SamplingParams, vocab_size: int = V, seen: Sequence[int] = ()
) -> Sampler:
    """A sampler with a slot for each."""
    sampler = Sampler(slots=len(requests), vocab_size=vocab_size, backend=CPU_BACKEND)
    for slot, params in enumerate(requests):
        sampler.open(slot, params, seen)
    return sampler


def draw(
    sampler: Sampler, logits: Tensor, slots: Sequence[int], positions: Sequence[int]
) -> list[int]:
    """A token for each of these slots, from logits [V] or [N, V]."""
    rows = logits.expand(len(slots), logits.shape[-1]).contiguous()
    return sampler.sample(rows, torch.tensor(slots), torch.tensor(positions)).tolist()


def draws(logits: Tensor, count: int, seen: Sequence[int] = (), **params: object) -> list[int]:
    """What one request draws at positions 0, 1, … from the same logits [V]."""
    sampler = sampler_for(SamplingParams(**params), vocab_size=len(logits), seen=seen)
    return [draw(sampler, logits, [0], [position])[0] for position in range(count)]


def made_at_once(
    params: SamplingParams, logits: Tensor, count: int, banned: Sequence[int] = ()
) -> Tensor:
    """How often each token is drawn at positions 0, 1, …, without penalties: counts [V]."""
    sampler = sampler_for(params, vocab_size=len(logits))
    sampler.ban(0, banned)
    counts = torch.zeros(len(logits), dtype=torch.int64)
    for positions in torch.arange(count).split(5_000):
        rows = logits.expand(len(positions), -1).contiguous()
        counts += sampler.sample(rows, torch.zeros_like(positions), positions).bincount(
            minlength=len(logits)
        )
    return counts


# -- random bits ---------------------------------------------------------------------------------


@njit
def _philox(counter, key):
    return philox(counter[0], counter[1], counter[2], counter[3], key[0], key[1])


@pytest.mark.parametrize(
    ("counter", "key", "bits"),
    [
        ("0" * 32, "0" * 16, "6627e8d5e169c58dbc57ac4c9b00dbd8"),
        ("f" * 32, "f" * 16, "408f276d41c83b0ea20bc7c66d5451fd"),
        (
            "243f6a8885a308d313198a2e03707344",
            "a4093822299f31d0",
            "d16cfe0994fdcceb5001e42024126ea1",
        ),
    ],
)
def test_philox_gives_the_known_answers_of_random123(counter: str, key: str, bits: str) -> None:
    def words(digits: str) -> np.ndarray:
        parts = [int(digits[i : i + 8], 16) for i in range(0, len(digits), 8)]
        return np.array(parts, dtype=np.uint32)

    assert list(_philox(words(counter), words(key))) == list(words(bits))


# -- distributions -------------------------------------------------------------------------------

PROMPT, OUTPUT = [3, 9, 9, 20], [7, 20, 7, 7]
KEPT = [
    {name: value for name, value in zip(("top_k", "top_p", "min_p"), values, strict=True) if value}
    for values in itertools.product((0, 12), (0, 0.8), (0, 0.05))
]
SHAPES: list[dict[str, object]] = [
    {},
    {"logit_bias": {5: 3.0, 40: -2.0, 41: 2.5}},
    {"repetition_penalty": 1.3},
    {"presence_penalty": 0.8, "frequency_penalty": 0.4},
    {
        "logit_bias": {7: 2.0, 41: 2.5},
        "repetition_penalty": 0.8,
        "presence_penalty": -0.5,
        "frequency_penalty": 0.6,
    },
]


def made_after_output(
    params: SamplingParams, logits: Tensor, count: int, banned: Sequence[int] = ()
) -> Tensor:
    """How often each token is drawn after PROMPT and OUTPUT: counts [V]. Each draw is of a slot of
    its own, since it is counted."""
    slots = min(count, 1_000)
    every = list(range(slots))
    sampler = Sampler(slots=slots, vocab_size=len(logits), backend=CPU_BACKEND)
    counts = torch.zeros(len(logits), dtype=torch.int64)
    for first in range(0, count, slots):
        for slot in every:
            sampler.open(slot, params, PROMPT)
        for position, token in enumerate(OUTPUT):
            certain = torch.zeros_like(logits).index_fill_(0, torch.tensor([token]), ALWAYS)
            assert draw(sampler, certain, every, [position] * slots) == [token] * slots
        for slot in every:
            sampler.ban(slot, banned)
        positions = torch.arange(first, first + slots)
        rows = logits.expand(slots, -1).contiguous()
        counts += sampler.sample(rows, torch.arange(slots), positions).bincount(
            minlength=len(logits)
        )
    return counts


@pytest.mark.parametrize("count", DRAWS)
@pytest.mark.parametrize("temperature", [0.7, 1.6])
@pytest.mark.parametrize("kept", KEPT, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=["plain", "bias", "repetition", "additive", "all"])
def test_draws_follow_the_reference_for_every_combination_of_settings(
    shape: dict[str, object], kept: dict[str, float], temperature: float, count: int
) -> None:
    logits = torch.randn(60, generator=torch.Generator().manual_seed(4)) * 1.5
    params = SamplingParams(temperature=temperature, seed=99, **shape, **kept)
    if params.penalizes:
        counts = made_after_output(params, logits, count)
        expected = probabilities(logits, params, PROMPT, OUTPUT)
    else:
        counts = made_at_once(params, logits, count)
        expected = probabilities(logits, params)
    assert int(counts.sum()) == count
    assert chi_square(counts, expected) > 0.001


ALLOWED = frozenset([2, 5, 7, 11, 20, 33, 41, 59])


@pytest.mark.parametrize("count", DRAWS)
@pytest.mark.parametrize("kept", KEPT[::3], ids=str)
@pytest.mark.parametrize("shape", SHAPES[::4], ids=["plain", "all"])
@pytest.mark.parametrize(
    ("allowed", "banned"),
    [(ALLOWED, []), (frozenset(), [0, 7, 20, 41, 59]), (ALLOWED, [3, 7, 41])],
    ids=["allowed", "banned", "both"],
)
def test_draws_of_the_tokens_that_are_left_follow_the_reference(
    allowed: frozenset[int],
    banned: list[int],
    shape: dict[str, object],
    kept: dict[str, float],
    count: int,
) -> None:
    logits = torch.randn(60, generator=torch.Generator().manual_seed(4)) * 1.5
    params = SamplingParams(temperature=0.7, seed=98, allowed_token_ids=allowed, **shape, **kept)
    if not params.penalizes:
        counts = made_at_once(params, logits, count, banned)
        expected = probabilities(logits, params, banned=banned)
    else:
        counts = made_after_output(params, logits, count, banned)
        expected = probabilities(logits, params, PROMPT, OUTPUT, banned)
    assert int(counts.sum()) == count
    assert chi_square(counts, expected) > 0.001


@pytest.mark.parametrize("count", DRAWS)
@pytest.mark.parametrize(
    "params",
    [{"top_k": 6}, {"top_p": 0.7}, {"top_p": 0.5, "top_k": 9}, {"min_p": 0.3}, {}],
    ids=str,
)
def test_equal_logits_are_kept_from_the_lowest_token_on(
    params: dict[str, float], count: int
) -> None:
    logits = torch.tensor([0.0, 1.0, 2.0, 1.0, -0.0, 2.0, 1.0, 0.0, 1.0, 2.0, -1.0, 1.0])
    request = SamplingParams(temperature=1.0, seed=3, **params)
    counts = made_at_once(request, logits, count)
    assert chi_square(counts, probabilities(logits, request)) > 0.001


def test_a_vocabulary_of_equal_logits_is_cut_by_token() -> None:
    logits = torch.full((1000,), 7.25)
    for params, kept in (({"top_k": 10}, 10), ({"top_p": 0.25}, 250), ({}, 1000)):
        request = SamplingParams(temperature=0.5, seed=8, **params)
        drawn = made_at_once(request, logits, 20_000)
        assert drawn[:kept].all() and not drawn[kept:].any()


def test_one_token_with_all_of_the_probability_is_drawn_always() -> None:
    logits = torch.full((V,), -40.0)
    logits[77] = 60.0
    for params in ({}, {"top_k": 5}, {"top_p": 0.999}, {"min_p": 1e-9}):
        counts = made_at_once(SamplingParams(temperature=1.0, **params), logits, 20_000)
        assert int(counts[77]) == 20_000


def test_a_top_p_below_the_largest_probability_leaves_the_most_likely() -> None:
    logits = torch.randn(V)
    for top_p in (1e-50, 1e-9, 0.9 * float(logits.softmax(0).max())):
        assert set(draws(logits, 50, temperature=1.0, top_p=top_p)) == {int(logits.argmax())}


@pytest.mark.parametrize("count", DRAWS)
def test_any_cut_of_any_logits_is_that_of_a_stable_sort(count: int) -> None:
    random = np.random.default_rng(5)
    for number in range(count // 100):
        size = int(random.integers(1, 400))
        logits = torch.from_numpy(random.normal(size=size) * 10 ** random.uniform(-2, 2)).float()
        if number % 3 == 0:
            logits = logits.round()
        request = SamplingParams(
            temperature=float(10 ** random.uniform(-1, 1)),
            top_k=int(random.integers(0, size + 2)) if number % 2 else 0,
            top_p=float(random.uniform(0.05, 1)) if number % 5 else 1.0,
            seed=number,
        )
        expected = probabilities(logits, request)
        counts = made_at_once(request, logits, 200)
        assert not counts[expected == 0].any(), (number, request)


# -- extremes ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "params",
    [
        {"temperature": 1e-50},
        {"temperature": 1e-320},
        {"temperature": 1e30},
        {"temperature": 1e300},
        {"temperature": 1.0, "top_p": 1e-50},
        {"temperature": 1.0, "top_p": 1 - 1e-12},
        {"temperature": 1.0, "min_p": 1.0},
        {"temperature": 1e-300, "top_p": 1e-300, "repetition_penalty": 0.01},
        {"temperature": 1.0, "repetition_penalty": 100.0},
        {"temperature": 0.01, "top_k": 3},
    ],
    ids=str,
)
@pytest.mark.parametrize(
    "logits",
    [[1.0, 3.0, -2.0, 2.9], [0.0, 3.4e38, -3.4e38, 1.0], [0.0, 1e-45, -1e-45, 0.0]],
    ids=["usual", "huge", "tiny"],
)
def test_every_allowed_value_draws_a_token(params: dict[str, float], logits: list[float]) -> None:
    drawn = draws(torch.tensor(logits), 20, seen=[0, 1], **params)
    assert all(0 <= token < 4 for token in drawn)
    if params["temperature"] < 1e-40 and len(params) == 1 and max(logits) > 1:
        assert set(drawn) == {1}  # as cold as that is greedy


def test_the_hottest_draw_is_uniform() -> None:
    logits = torch.randn(50) * 20
    counts = made_at_once(SamplingParams(temperature=1e300, seed=6), logits, 20_000)
    assert chi_square(counts, torch.full((50,), 1 / 50, dtype=torch.float64)) > 0.001


@pytest.mark.parametrize("kept", [{}, {"top_k": 30}, {"top_p": 0.999}], ids=str)
def test_the_hottest_draw_is_uniform_among_the_tokens_that_are_left(kept: dict[str, float]) -> None:
    logits, left = torch.randn(50) * 20, [3, 11, 40, 42]
    request = SamplingParams(
        temperature=1e300, seed=6, allowed_token_ids=frozenset([*left, 7, 8]), **kept
    )
    counts = made_at_once(request, logits, 20_000, banned=[7, 8])
    expected = torch.zeros(50, dtype=torch.float64).index_fill_(0, torch.tensor(left), 1 / 4)
    assert chi_square(counts, expected) > 0.001


def test_greedy_takes_the_lowest_of_equal_tokens() -> None:
    logits = torch.zeros(V)
    logits[[17, 30, 400]] = 2.5
    assert draws(logits, 3) == [17, 17, 17]
    assert draws(logits, 1, logit_bias={4: -1.0}) == [17]
    assert draws(torch.tensor([-1.0, -0.0, 0.0]), 1, logit_bias={0: -1.0}) == [1]


@pytest.mark.parametrize("compiled", [False, True], ids=["before compiling", "compiled"])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, -math.nan])
def test_a_row_that_is_not_finite_has_no_token_and_disturbs_no_other(
    value: float, compiled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    requests = [SamplingParams() for _ in range(4)]
    if compiled:
        requests[1:3] = [
            SamplingParams(temperature=0.9, top_p=0.9, seed=4),
            SamplingParams(temperature=0.9, repetition_penalty=1.5, logit_bias={3: 1.0}),
        ]
    else:
        monkeypatch.setattr(Kernel, "compiled", False)
    clean = torch.randn(4, V)
    expected = draw(sampler_for(*requests, seen=[1]), clean, range(4), [5] * 4)
    for bad in range(4):
        logits = clean.clone()
        logits[bad, 123] = value
        sampler = sampler_for(*requests, seen=[1])
        drawn = draw(sampler, logits, range(4), [5] * 4)
        assert drawn == [-1 if row == bad else expected[row] for row in range(4)]
        assert sampler.drawn[:4].tolist() == drawn


# -- penalties and biases ------------------------------------------------------------------------


def test_repetition_penalty_is_transformers() -> None:
    logits = torch.randn(V)
    seen = [3, 8, int(logits.argmax())]
    theirs = RepetitionPenaltyLogitsProcessor(1.7)(torch.tensor([seen]), logits[None].clone())[0]
    assert draws(logits, 1, seen=seen, repetition_penalty=1.7) == [int(theirs.argmax())]


def test_presence_and_frequency_penalties_count_the_output_only() -> None:
    logits = torch.zeros(4)
    logits[0] = 1.0
    # 1, 0.6, 0.2, then -0.2 is less than token 1's 0
    assert draws(logits, 4, seen=[0, 0, 0, 0], frequency_penalty=0.4) == [0, 0, 0, 1]
    assert draws(logits, 2, presence_penalty=2.0) == [0, 1]


def test_logit_bias_is_added() -> None:
    logits = torch.randn(V)
    assert draws(logits, 1, logit_bias={42: 100.0}) == [42]
    assert draws(logits, 1, logit_bias={int(logits.argmax()): -100.0}) != [int(logits.argmax())]


def test_a_ban_holds_until_the_next_one() -> None:
    logits = torch.tensor([5.0, 4.0, 3.0, 2.0, 1.0])
    plain, few = SamplingParams(), SamplingParams(allowed_token_ids=frozenset([1, 3, 4]))
    sampler = sampler_for(plain, few, vocab_size=5)
    for bans, expected in (([], [0, 1]), ([0, 1], [2, 3]), ([1], [0, 3]), ([0, 1, 3], [2, 4])):
        for slot in range(2):
            sampler.ban(slot, bans)
        assert draw(sampler, logits, [0, 1], [0, 0]) == expected
    sampler.open(0, plain, [])
    sampler.close(1)
    assert draw(sampler, logits, [0, 1], [0, 0]) == [0, 0]


def test_what_is_banned_changes_no_draw_of_others_and_no_ban_changes_none() -> None:
    logits = torch.randn(3, V)
    kinds = [{"temperature": 0.8, "top_p": 0.9}, {"temperature": 1.2, "top_k": 20, "seed": 5}, {}]
    requests = [SamplingParams(**kind) for kind in kinds]
    free, every = sampler_for(*requests), sampler_for(*requests)
    everything = SamplingParams(allowed_token_ids=frozenset(range(V)), **kinds[1])
    every.open(1, everything, [])
    every.ban(0, [])
    for position in range(20):
        usual = draw(free, logits, range(3), [position] * 3)
        assert draw(every, logits, range(3), [position] * 3) == usual
        every.ban(2, [int(logits[2].argmax())])
        assert draw(every, logits, range(3), [position] * 3)[:2] == usual[:2]
        every.ban(2, [])


def test_logits_that_are_not_finite_are_found_even_where_they_are_banned() -> None:
    for value in (math.nan, math.inf, -math.inf):
        for temperature in (0.0, 1.0):
            logits = torch.randn(V)
            logits[7] = value
            request = SamplingParams(temperature=temperature, allowed_token_ids=frozenset([1, 2]))
            sampler = sampler_for(request)
            sampler.ban(0, [7])
            assert draw(sampler, logits, [0], [0]) == [-1]


def test_a_slot_that_is_opened_again_knows_nothing_of_its_last_request() -> None:
    logits, hard = torch.randn(V), {"logit_bias": {1: 90.0}, "presence_penalty": 2.0}
    usual = SamplingParams(temperature=1.0, seed=2, frequency_penalty=0.1)
    sampler = sampler_for(SamplingParams(temperature=0.5, top_k=2, seed=9, **hard), seen=[4, 5])
    for position in range(5):
        draw(sampler, logits, [0], [position])
    sampler.close(0)
    assert draw(sampler, logits, [0], [0]) == [int(logits.argmax())]
    sampler.open(0, usual, [6])
    again = [draw(sampler, logits, [0], [position])[0] for position in range(30)]
    fresh = sampler_for(usual, seen=[6])
    assert again == [draw(fresh, logits, [0], [position])[0] for position in range(30)]


def test_a_closed_slot_holds_no_memory() -> None:
    sampler = Sampler(slots=2, vocab_size=V, backend=CPU_BACKEND)
    before = sampler.nbytes
    sampler.open(1, SamplingParams(presence_penalty=1.0, logit_bias={3: 1.0}), [])
    assert sampler.nbytes == before + 4 * V + 8 + 4
    sampler.close(1)
    assert sampler.nbytes == before
    sampler.open(1, SamplingParams(allowed_token_ids=frozenset([2])), [])
    sampler.ban(1, [3, 4])
    sampler.close(1)
    assert sampler.nbytes == before


# -- seeds ---------------------------------------------------------------------------------------


def test_a_seed_repeats_and_another_differs() -> None:
    logits = torch.randn(V)
    made = {seed: draws(logits, 30, temperature=1.0, seed=seed) for seed in (5, 6, 5 + (1 << 32))}
    assert draws(logits, 30, temperature=1.0, seed=5) == made[5]
    assert len({tuple(tokens) for tokens in made.values()}) == 3
    assert draws(logits, 3, temperature=1.0, seed=LARGEST_SEED)


def test_a_seed_draws_the_same_alone_and_in_a_batch_that_changes_at_every_step() -> None:
    generator = torch.Generator().manual_seed(11)
    random = np.random.default_rng(11)
    sessions, steps, vocabulary = 32, 12, 300
    kinds: list[dict[str, object]] = [
        {"temperature": 0.8, "top_p": 0.9},
        {"temperature": 1.2, "top_k": 20, "min_p": 0.02},
        {"temperature": 1.0, "repetition_penalty": 1.2, "frequency_penalty": 0.3},
        {},
        {"temperature": 0.9, "logit_bias": {7: 2.0}},
    ]
    requests = [SamplingParams(seed=s, **kinds[s % len(kinds)]) for s in range(sessions)]
    logits = torch.randn(sessions, steps, vocabulary, generator=generator) * 2

    def alone(session: int) -> list[int]:
        sampler = sampler_for(requests[session], vocab_size=vocabulary, seen=[1, 2])
        return [draw(sampler, logits[session, t], [0], [t])[0] for t in range(steps)]

    sampler = sampler_for(*requests, vocab_size=vocabulary, seen=[1, 2])
    made: list[list[int]] = [[] for _ in range(sessions)]
    while unfinished := [s for s in range(sessions) if len(made[s]) < steps]:
        live = random.permutation(unfinished)[: random.integers(1, len(unfinished) + 1)].tolist()
        rows = torch.stack([logits[s, len(made[s])] for s in live] + [logits[0, 0]])
        positions = [len(made[s]) for s in live]
        # and a row that belongs to no session, as in a captured step
        *drawn, _ = draw(sampler, rows, [*live, sessions], [*positions, 0])
        for session, token in zip(live, drawn, strict=True):
            made[session].append(token)
    assert made == [alone(session) for session in range(sessions)]


def test_what_was_drawn_stays_where_the_next_step_reads_it() -> None:
    sampler = sampler_for(*[SamplingParams()] * 3)
    where = sampler.drawn.data_ptr()
    logits = torch.randn(2, V)
    drawn = draw(sampler, logits, [2, 0], [4, 9])
    assert drawn == logits.argmax(1).tolist()
    assert sampler.drawn[[2, 0]].tolist() == drawn
    assert sampler.drawn.data_ptr() == where


def test_sampling_leaves_the_logits_as_they_were() -> None:
    logits = torch.randn(1, V)
    before = logits.clone()
    every = SamplingParams(
        temperature=0.7,
        top_k=30,
        top_p=0.9,
        min_p=0.1,
        logit_bias={1: 5.0},
        repetition_penalty=2.0,
        presence_penalty=1.0,
        frequency_penalty=1.0,
    )
    sampler_for(every).sample(logits, torch.tensor([0]), torch.tensor([0]))
    assert torch.equal(logits, before)


def test_it_draws_the_same_where_torch_has_other_threads_than_libgomp() -> None:
    code = """
import torch
from griffin_core.backends.cpu import team
from griffin_core.backends.select import backend_for
from griffin_core.sampling.params import SamplingParams
from griffin_core.sampling.sampler import Sampler
sampler = Sampler(slots=1, vocab_size=400, backend=backend_for(torch.device("cpu"), torch.float32))
sampler.open(0, SamplingParams(temperature=0.7, top_p=0.9, seed=3), [])
logits = torch.randn(8, 400, generator=torch.Generator().manual_seed(1))
tokens = sampler.sample(logits, torch.zeros(8, dtype=torch.int64), torch.arange(8))
"""
    alone = code.replace("sampler = ", "team._gomp = lambda: None\nsampler = ", 1)
    made = subprocess.run(
        [sys.executable, "-c", f"{alone}\nprint(tokens.tolist())"],
        capture_output=True,
        text=True,
        check=True,
    )
    here: dict[str, Tensor] = {}
    exec(code, here)
    assert made.stdout.strip() == str(here["tokens"].tolist())


# -- log-probabilities ---------------------------------------------------------------------------


def test_logprobs_are_of_the_models_own_distribution() -> None:
    logits = torch.randn(5, V)
    tokens = torch.tensor([1, 17, 3, -1, 9])
    made = logprobs_of(logits, torch.tensor([1, 4]), tokens[[1, 4]], 3).to_host()
    for row, (source, top) in enumerate(((1, 3), (4, 0))):
        expected = logits[source].log_softmax(0)
        got = made.read(row, top)
        assert got.chosen == pytest.approx(expected[tokens[source]].item())
        assert [token for token, _ in got.top] == expected.topk(top).indices.tolist()


# -- the reference -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kept", "warpers"),
    [
        ({"top_k": 7}, [TopKLogitsWarper(7)]),
        ({"top_p": 0.6}, [TopPLogitsWarper(0.6)]),
        ({"min_p": 0.2}, [MinPLogitsWarper(0.2)]),
        (
            {"top_k": 50, "top_p": 0.9, "min_p": 0.05},
            [TopKLogitsWarper(50), TopPLogitsWarper(0.9), MinPLogitsWarper(0.05)],
        ),
    ],
    ids=["top_k", "top_p", "min_p", "all"],
)
def test_the_references_truncation_is_transformers(
    kept: dict[str, float], warpers: list[object]
) -> None:
    logits = torch.randn(V) * 3
    theirs = logits[None].clone()
    for warper in warpers:
        theirs = warper(None, theirs)
    ours = probabilities(logits, SamplingParams(temperature=1.0, **kept))
    torch.testing.assert_close(ours.float(), theirs[0].softmax(0))


# -- parameters ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("field", "value", "allowed"),
    [
        ("temperature", -1.0, ">= 0"),
        ("temperature", math.nan, ">= 0"),
        ("temperature", math.inf, ">= 0"),
        ("top_p", 0.0, "(0, 1]"),
        ("top_p", 2.0, "(0, 1]"),
        ("min_p", -0.1, "[0, 1]"),
        ("repetition_penalty", 0.0, "[0.01, 100]"),
        ("presence_penalty", 2.5, "[-2, 2]"),
        ("frequency_penalty", math.nan, "[-2, 2]"),
        ("seed", -1, "[0, 2^64)"),
        ("seed", 1 << 64, "[0, 2^64)"),
    ],
)
def test_values_out_of_range_name_field_value_and_range(
    field: str, value: float, allowed: str
) -> None:
    with pytest.raises(InvalidRequest) as caught:
        SamplingParams(**{field: value})
    assert caught.value.field == f"sampling.{field}"
    assert str(caught.value) == f"sampling.{field}: got {value!r}; allowed: {allowed}"


def test_logit_biases_out_of_range_are_refused() -> None:
    with pytest.raises(InvalidRequest, match=r"logit_bias\[3\]"):
        SamplingParams(logit_bias={3: math.nan})
    with pytest.raises(InvalidRequest, match="allowed_token_ids: got 1025 ids"):
        SamplingParams(allowed_token_ids=frozenset(range(1025)))
    with pytest.raises(InvalidRequest, match="at most 1024"):
        SamplingParams(logit_bias=dict.fromkeys(range(1025), 1.0))
