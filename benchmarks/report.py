"""The common parts of benchmarks: the machine, its ceilings, medians over rounds, and the last
line."""

from __future__ import annotations

import json
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
import transformers

from griffin_core.model.load import Model


class Rounds:
    """Times candidates in turn, so that other load on the machine affects all of them alike.

    Args:
        candidates: each returns the seconds that it took; called once before, to warm up.
        rounds: the number of turns of each.
    """

    def __init__(self, candidates: Mapping[str, Callable[[], float]], *, rounds: int) -> None:
        for run in candidates.values():
            run()
        self._ms: dict[str, list[float]] = {name: [] for name in candidates}
        for _ in range(rounds):
            for name, run in candidates.items():
                self._ms[name].append(run() * 1e3)

    def median_ms(self, digits: int = 2) -> dict[str, float]:
        """Returns the median of each candidate in milliseconds, rounded to ``digits``."""
        return {name: round(statistics.median(ms), digits) for name, ms in self._ms.items()}

    def ratio(self, over: str, under: str) -> float:
        """Returns the median of the ratios within each round, which slow changes of the machine do
        not affect."""
        pairs = zip(self._ms[over], self._ms[under], strict=True)
        return round(statistics.median(a / b for a, b in pairs), 3)


def timed(work: Callable[[], object]) -> Callable[[], float]:
    """Returns a function that measures the seconds of a call."""

    def run() -> float:
        clock = time.perf_counter()
        work()
        return time.perf_counter() - clock

    return run


def apart(work: Callable[[], float]) -> float:
    """Makes a call on its own thread and returns its result. When the thread ends, its OpenMP
    workers end too; with more workers than CPUs, those of an engine in this process would wait by
    sleeping (docs/LOG.md)."""
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(work).result()


def read_bandwidth() -> float:
    """Returns the bytes/s of reading 1 GiB from memory, the best of several."""

    def best() -> float:
        data = torch.ones(1 << 28)
        return data.nbytes / min(timed(data.sum)() for _ in range(7))

    return apart(best)


def matmul_rate(dtype: torch.dtype, tokens: int, width: int, neurons: int) -> float:
    """Returns the FLOP/s of a matrix product of the model's own shape, the best of several."""
    x, w = torch.randn(tokens, width, dtype=dtype), torch.randn(neurons, width, dtype=dtype)
    return (
        2
        * tokens
        * width
        * neurons
        / min(timed(lambda: torch.nn.functional.linear(x, w))() for _ in range(50))
    )


def about(model: Model) -> dict[str, str]:
    """Returns what the last line says about a model."""
    return {"model": model.name, "dtype": str(model.decoder.dtype).removeprefix("torch.")}


def finish(benchmark: str, results: Mapping[str, Any]) -> None:
    """Prints the last line."""
    print(
        json.dumps(
            {
                "benchmark": benchmark,
                "commit": _git("rev-parse", "--short=12", "HEAD"),
                "dirty": bool(_git("status", "--porcelain")),
                "device": _device(),
                "threads": torch.get_num_threads(),
                "python": platform.python_version(),
                "torch": torch.__version__,
                "transformers": transformers.__version__,
                **results,
            }
        )
    )


def _git(*arguments: str) -> str:
    done = subprocess.run(
        ["git", *arguments],
        cwd=Path(__file__).parent,
        capture_output=True,
        text=True,
        check=False,
    )
    return done.stdout.strip()


def _device() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{names[0]}, {len(names)} CPUs" if names else platform.processor()
