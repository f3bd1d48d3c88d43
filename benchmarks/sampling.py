"""Sampling for a batch, on the GPU if there is one, else on this CPU: the sampler of the servers,
compared with a full sort in float64, one row after the other.

Prints the ceiling first: the bytes of the logits, read once. On a GPU the sampler runs in a CUDA
graph, as it does in a step.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks.report import Rounds, finish, read_bandwidth
from griffin_core.backends.select import backend_for
from griffin_core.sampling.params import SamplingParams
from griffin_core.sampling.sampler import Sampler

ROWS = (1, 4, 16, 32)
SEEN = tuple(range(0, 4096, 8))
SETTINGS: dict[str, dict[str, float]] = {
    "greedy": {},
    "temperature": {"temperature": 0.7},
    "top_p": {"temperature": 0.7, "top_p": 0.9},
    "top_k": {"temperature": 0.7, "top_k": 50},
    "all": {
        "temperature": 0.7,
        "top_p": 0.9,
        "top_k": 50,
        "min_p": 0.02,
        "repetition_penalty": 1.1,
    },
}
REPLAYS = 20


def run_of(logits: Tensor, params: SamplingParams) -> Callable[[], float]:
    """Returns a function that samples once for each row and returns the seconds."""
    rows, vocab_size = logits.shape
    sampler = Sampler(
        slots=rows, vocab_size=vocab_size, backend=backend_for(logits.device, torch.float32)
    )
    for slot in range(rows):
        sampler.open(slot, params, SEEN)
    slots = torch.arange(rows, device=logits.device)
    positions = torch.arange(rows, device=logits.device)

    def work() -> object:
        return sampler.sample(logits, slots, positions)

    if logits.device.type == "cuda":
        work()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            work()
        work = graph.replay

    def timed() -> float:
        _wait(logits)
        clock = time.perf_counter()
        for _ in range(REPLAYS):
            work()
        _wait(logits)
        return (time.perf_counter() - clock) / REPLAYS

    return timed


def sort_of(logits: Tensor, params: SamplingParams) -> Callable[[], float]:
    """Returns a function that copies each row to the host and sorts the vocabulary in float64; it
    returns the seconds."""

    def draw(row: Tensor) -> int:
        x = row.cpu().double()
        ranked, order = (x / params.temperature).softmax(dim=0).sort(descending=True, stable=True)
        ranked[ranked.cumsum(dim=0) - ranked >= params.top_p] = 0
        return int(order[torch.multinomial(ranked, 1)])

    def timed() -> float:
        _wait(logits)
        clock = time.perf_counter()
        for row in logits:
            draw(row)
        return time.perf_counter() - clock

    return timed


def _wait(x: Tensor) -> None:
    if x.device.type == "cuda":
        torch.cuda.synchronize()


def _bandwidth(device: torch.device) -> float:
    """Returns the bytes/s of reading."""
    if device.type != "cuda":
        return read_bandwidth()
    data = torch.ones(1 << 28, device=device)

    def read() -> float:
        _wait(data)
        clock = time.perf_counter()
        data.sum()
        _wait(data)
        return time.perf_counter() - clock

    return data.nbytes / min(read() for _ in range(7))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--vocabulary", type=int, help="default: 128256 on a GPU, else 49152")
    parser.add_argument("--spread", type=float, default=2.0, help="standard deviation of logits")
    parser.add_argument("--rounds", type=int, default=11)
    asked = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    vocab_size = asked.vocabulary or (128_256 if device.type == "cuda" else 49_152)
    bandwidth = _bandwidth(device)
    ceiling_ms = {rows: round(rows * vocab_size * 4 / bandwidth * 1e3, 4) for rows in ROWS}
    card = torch.cuda.get_device_name() if device.type == "cuda" else "this CPU"
    print(f"a vocabulary of {vocab_size} on {card}")
    print(f"ceiling, the logits read once at {bandwidth / 1e9:.0f} GB/s: {ceiling_ms} ms")
    results: dict[str, dict[int, float]] = {name: {} for name in SETTINGS}
    results["top_p by sorting"] = {}
    for rows in ROWS:
        generator = torch.Generator().manual_seed(rows)
        logits = (torch.randn(rows, vocab_size, generator=generator) * asked.spread).to(device)
        each = {name: SamplingParams(**values) for name, values in SETTINGS.items()}
        runs = {name: run_of(logits, params) for name, params in each.items()}
        for name, ms in Rounds(runs, rounds=asked.rounds).median_ms(digits=4).items():
            results[name][rows] = ms
        before = Rounds({"sort": sort_of(logits, each["top_p"])}, rounds=3)
        results["top_p by sorting"][rows] = before.median_ms()["sort"]
    print(f"{'ms for rows':<20}" + "".join(f"{rows:>10}" for rows in ROWS))
    for name, by_rows in results.items():
        print(f"{name:<20}" + "".join(f"{by_rows[rows]:>10.3f}" for rows in ROWS))
    finish(
        "sampling",
        {
            "vocabulary": vocab_size,
            "card": card,
            "ceiling_ms": ceiling_ms,
            "draw_ms": results,
        },
    )


if __name__ == "__main__":
    main()
