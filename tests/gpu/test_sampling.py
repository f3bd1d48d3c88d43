"""The GPU's sampler against the CPU's, which tests/unit/core/test_sampling.py tests in float64.

Also in Triton's interpreter on a CPU (TRITON_INTERPRET=1), with fewer draws.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor

from griffin_core.backends.cpu.sampler_slots import (
    CpuSlots,
)
from griffin_core.sampling.params import LARGEST_SEED, SamplingParams
from tests.gpu.devices import DEVICE, INTERPRETED, needs_cuda, needs_triton
from tests.reference_sampler import chi_square, probabilities

pytestmark = [
    pytest.mark.gpu,
    needs_triton,
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),  # NumPy's, of the interpreter's floats
]

if DEVICE is not None:
    import triton
    import triton.language as tl

    from griffin_core.backends.cuda.sampler_slots import (
        CudaSlots,
    )

VOCABULARY = 2500 if INTERPRETED else 128_256
DRAWS = 8 if INTERPRETED else 20_000
STEPS = 1 if INTERPRETED else 3
DIFFER = 1e-4
"""Most draws in which a GPU may differ from a CPU: where rounding decides."""

SETTINGS: list[dict[str, object]] = [
    {},
    {"temperature": 0.7, "top_p": 0.9},
    {"temperature": 0.7},
    {"temperature": 1.0, "top_k": 40},
    {"temperature": 1.3, "top_k": 300, "top_p": 0.8, "min_p": 0.01},
    {"temperature": 0.5, "min_p": 0.1, "seed": LARGEST_SEED},
    {"temperature": 1e-3, "top_k": 200},
    {"temperature": 1e300, "top_p": 0.5},
    {"repetition_penalty": 1.4, "logit_bias": {9: 3.0}},
    {
        "temperature": 0.9,
        "top_p": 0.95,
        "logit_bias": {3: 2.0, 17: -9.0},
        "repetition_penalty": 1.2,
        "presence_penalty": 0.4,
        "frequency_penalty": 0.2,
        "seed": 1 << 63,
    },
    {"allowed_token_ids": frozenset([5, 90, 700, 2499])},
    {"temperature": 1e300, "top_k": 3, "allowed_token_ids": frozenset([3, 90, 700, 2499])},
    {
        "temperature": 0.9,
        "top_p": 0.95,
        "logit_bias": {3: 2.0, 17: -9.0},
        "repetition_penalty": 1.2,
        "allowed_token_ids": frozenset([3, 5, 17, 90, 700, 2499]),
    },
]
SEEN = [1, 2, 3, 5, 5, 700]


@pytest.fixture(autouse=True)
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever a kernel does not write is nonsense."""
    made: Callable[..., Tensor] = Tensor.new_empty
    monkeypatch.setattr(Tensor, "new_empty", lambda *a, **k: made(*a, **k).fill_(0x3A3A3A3A))


def normal(*shape: int, seed: int = 1, scale: float = 2.0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * scale


def both(requests: Sequence[SamplingParams], vocabulary: int) -> tuple[CpuSlots, CudaSlots]:
    """The same requests in slots of a CPU and of a GPU."""
    assert DEVICE is not None
    cpu = CpuSlots(slots=len(requests), vocab_size=vocabulary)
    gpu = CudaSlots(slots=len(requests), vocab_size=vocabulary, device=torch.device(DEVICE))
    for slot, params in enumerate(requests):
        cpu.open(slot, params, SEEN)
        gpu.open(slot, params, SEEN)
    return cpu, gpu


def on_gpu(gpu: CudaSlots, logits: Tensor, slots: Tensor, positions: Tensor) -> Tensor:
    """Draws on the GPU, on the host."""
    return gpu.sample(logits.to(DEVICE), slots.to(DEVICE), positions.to(DEVICE)).cpu()


@pytest.mark.parametrize("kind", ["spread", "ties", "equal", "huge", "one"])
def test_steps_of_all_settings_draw_what_a_cpu_draws(kind: str) -> None:
    requests = [SamplingParams(**settings) for settings in SETTINGS]
    cpu, gpu = both(requests, VOCABULARY)
    slots = torch.arange(len(requests) + 1)
    for step in range(STEPS):
        logits = normal(len(slots), VOCABULARY, seed=step)
        if kind == "ties":
            logits = logits.round()
        elif kind == "equal":
            logits[:] = 1.5
        elif kind == "huge":
            logits *= 1e37
            logits[:, :2] = torch.tensor([3.4e38, -3.4e38])
        elif kind == "one":
            logits[:, 77] = 500.0
        positions = slots + (step << 33)
        expected = cpu.sample(logits, slots, positions)
        assert on_gpu(gpu, logits, slots, positions).tolist() == expected.tolist()
        assert gpu.drawn.tolist() == cpu.drawn.tolist()


@pytest.mark.parametrize("settings", SETTINGS[1:8], ids=str)
@pytest.mark.parametrize("scale", [0.8, 3.0])
def test_hardly_a_draw_differs_from_a_cpus(settings: dict[str, object], scale: float) -> None:
    cpu, gpu = both([SamplingParams(**settings)], VOCABULARY)
    rows, differ = min(DRAWS, 50), 0
    for first in range(0, DRAWS, rows):
        logits = normal(rows, VOCABULARY, seed=first, scale=scale)
        slots, positions = torch.zeros(rows, dtype=torch.int64), torch.arange(first, first + rows)
        expected = cpu.sample(logits, slots, positions)
        differ += int((on_gpu(gpu, logits, slots, positions) != expected).sum())
    assert differ <= DIFFER * DRAWS


@needs_cuda
@pytest.mark.parametrize("settings", SETTINGS[1:8], ids=str)
def test_draws_follow_the_reference(settings: dict[str, object]) -> None:
    params, vocabulary = SamplingParams(**settings), 300
    _, gpu = both([params], vocabulary)
    logits = normal(vocabulary)
    counts = torch.zeros(vocabulary, dtype=torch.int64)
    for positions in torch.arange(100_000).split(5_000):
        rows = logits.expand(len(positions), -1).contiguous()
        drawn = on_gpu(gpu, rows, torch.zeros_like(positions), positions)
        counts += drawn.bincount(minlength=vocabulary)
    assert chi_square(counts, probabilities(logits, params)) > 0.001


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_row_that_is_not_finite_has_no_token_and_disturbs_no_other(value: float) -> None:
    requests = [SamplingParams(**SETTINGS[number]) for number in (0, 1, 9)]
    slots, positions = torch.arange(3), torch.arange(3)
    clean = normal(3, VOCABULARY)
    _, gpu = both(requests, VOCABULARY)
    expected = on_gpu(gpu, clean, slots, positions).tolist()
    for bad in range(3):
        logits = clean.clone()
        logits[bad, VOCABULARY - 1] = value
        _, gpu = both(requests, VOCABULARY)
        drawn = on_gpu(gpu, logits, slots, positions).tolist()
        assert drawn == [-1 if row == bad else expected[row] for row in range(3)]


def test_a_slot_that_is_opened_again_knows_nothing_of_its_last_request() -> None:
    hard, usual = SamplingParams(**SETTINGS[9]), SamplingParams(temperature=1.0, top_p=0.9)
    slots, positions = torch.zeros(1, dtype=torch.int64), torch.zeros(1, dtype=torch.int64)
    logits = normal(1, VOCABULARY)
    for after in (usual, SamplingParams(temperature=1.0, frequency_penalty=0.1)):
        _, gpu = both([hard], VOCABULARY)
        on_gpu(gpu, logits, slots, positions)
        gpu.close(0)
        assert on_gpu(gpu, logits, slots, positions).tolist() == [int(logits.argmax())]
        gpu.open(0, after, [8])
        cpu = CpuSlots(slots=1, vocab_size=VOCABULARY)
        cpu.open(0, after, [8])
        for step in range(3):
            at = torch.tensor([step])
            assert on_gpu(gpu, logits, slots, at).equal(cpu.sample(logits, slots, at))


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_bans_that_change_between_steps_are_a_cpus(settings: dict[str, object]) -> None:
    params = SamplingParams(**settings)
    cpu, gpu = both([params], VOCABULARY)
    slots, allowed = torch.zeros(1, dtype=torch.int64), sorted(params.allowed_token_ids)
    for step, banned in enumerate(([], [5, 90], [3, 700, 701], [*range(0, 2000, 2)], [])):
        logits = normal(1, VOCABULARY, seed=step)
        left = [token for token in allowed or range(VOCABULARY) if token not in banned]
        banned.append(int(logits[0, left].argmax()) if not allowed else 4)  # the argmax
        for device in (cpu, gpu):
            device.ban(0, banned)
        at = torch.tensor([step])
        drawn = on_gpu(gpu, logits, slots, at)
        assert drawn.equal(cpu.sample(logits, slots, at))
        assert int(drawn) in set(allowed or range(VOCABULARY)) - set(banned)


def test_small_vocabularies_are_drawn_from_too() -> None:
    for vocabulary in (1, 2, 7, 260, 1024, 1025):
        requests = [SamplingParams(temperature=0.8, top_p=0.7), SamplingParams(top_k=3, **WARM)]
        cpu = CpuSlots(slots=2, vocab_size=vocabulary)
        gpu = CudaSlots(slots=2, vocab_size=vocabulary, device=torch.device(str(DEVICE)))
        for slot, params in enumerate(requests):
            cpu.open(slot, params, [])
            gpu.open(slot, params, [])
        slots, positions = torch.tensor([0, 1, 2]), torch.tensor([3, 4, 5])
        logits = normal(3, vocabulary)
        expected = cpu.sample(logits, slots, positions)
        assert on_gpu(gpu, logits, slots, positions).equal(expected), vocabulary


WARM = {"temperature": 1.1, "seed": 12}

if DEVICE is not None:

    @triton.jit
    def _bits(out, seed, c0, c1, c2, c3):
        zero = tl.zeros((1,), tl.uint32)
        words = tl.philox(seed, zero + c0, zero + c1, zero + c2, zero + c3)
        for lane in tl.static_range(4):
            tl.store(out + lane + tl.arange(0, 1), words[lane].to(tl.int64))


@pytest.mark.parametrize(
    ("counter", "key", "bits"),
    [
        ((0, 0, 0, 0), 0, (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((0xFFFFFFFF,) * 4, -1, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            0x299F31D0A4093822,
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_tritons_philox_gives_the_known_answers_of_random123(
    counter: tuple[int, ...], key: int, bits: tuple[int, ...]
) -> None:
    out = torch.zeros(4, dtype=torch.int64, device=DEVICE)
    words = [word - (word >> 31 << 32) for word in counter]
    _bits[1,](out, key, *words)
    assert (out & 0xFFFFFFFF).tolist() == list(bits)


@needs_cuda
def test_a_captured_call_draws_for_whatever_stands_in_the_slots() -> None:
    requests = [SamplingParams(**settings) for settings in SETTINGS[:8]]
    cpu, gpu = both(requests, VOCABULARY)
    logits = torch.zeros((8, VOCABULARY), device="cuda")
    slots, positions = (torch.zeros(8, dtype=torch.int64, device="cuda") for _ in range(2))
    gpu.sample(logits, slots, positions)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        tokens = gpu.sample(logits, slots, positions)
    for step in range(6):
        order = torch.randperm(8)
        rows, at = normal(8, VOCABULARY, seed=step), torch.randint(1 << 40, (8,))
        logits.copy_(rows)
        slots.copy_(order)
        positions.copy_(at)
        graph.replay()
        assert tokens.tolist() == cpu.sample(rows, order, at).tolist()
        assert gpu.drawn.tolist() == cpu.drawn.tolist()
        params = SamplingParams(temperature=0.5 + step / 10, seed=step, frequency_penalty=0.2)
        cpu.open(step, params, [step])
        gpu.open(step, params, [step])
