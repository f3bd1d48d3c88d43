"""Prefill on one GPU: the cost of the statistic and the selection, on real shapes with random
weights.

Prints the GPU's rate of matrix products first: a prefill takes at least the time of its own
products at that rate.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from typing import Any

import torch

from benchmarks.ceiling import attention_weights
from benchmarks.cuda_decode import DTYPE, PROMPT, SHAPES, device_s, random_decoder
from benchmarks.prefill import without_statistic
from benchmarks.report import Rounds, finish, timed
from griffin_core.experts.selection import Selection
from griffin_core.forward.events import (
    PrefillFinished,
)
from griffin_core.forward.prefill import prefill

CHUNKS = (512, PROMPT)
"""Tokens per chunk: the default of a CPU server, and that of a GPU server, which is the whole
prompt."""


def product_rate() -> float:
    """Returns the FLOP/s of a matrix product as large as a layer's, the median of several."""
    x, w = (torch.randn(n, 8192, device="cuda", dtype=DTYPE) for n in (PROMPT, 16384))
    seconds = [device_s(lambda: torch.nn.functional.linear(x, w)) for _ in range(30)]
    return 2 * PROMPT * w.numel() / statistics.median(seconds[10:])


def waited(work: Callable[[], object]) -> Callable[[], float]:
    """Returns a function that measures the seconds until the device has done the work."""

    def run() -> None:
        work()
        torch.cuda.synchronize()

    return timed(run)


@torch.inference_mode()
def measure(name: str, rate: float) -> list[dict[str, Any]]:
    """Returns a row for each chunk size."""
    decoder, rows = random_decoder(name), []
    spec, neurons = decoder.spec, decoder.layers[0].ff.weights
    ff = (neurons.w_in.shape[0] + 1) * spec.intermediate_size * spec.hidden_size
    per_layer = attention_weights(spec) + ff
    ceiling_ms = 2e3 * len(spec.layers) * per_layer * PROMPT / rate
    token_ids, half = list(range(PROMPT)), Selection(density=0.5)
    print(f"\n{name}, {PROMPT} tokens: ceiling by its products {ceiling_ms:.1f} ms")
    for chunk in CHUNKS:
        selections: list[float] = []

        def counted(chunk: int = chunk, selections: list[float] = selections) -> None:
            *_, last = prefill(decoder, token_ids, half, chunk_tokens=chunk)
            assert isinstance(last, PrefillFinished)
            selections.append(1e3 * last.selection_s)

        def plain(chunk: int = chunk) -> None:
            without_statistic(decoder, torch.tensor(token_ids, device="cuda"), chunk)

        rounds = Rounds({"with statistic": waited(counted), "without": waited(plain)}, rounds=15)
        ms, ratio = rounds.median_ms(), rounds.ratio("with statistic", "without")
        selection_ms = statistics.median(selections)
        print(
            f"  chunks of {chunk:4}  {ms['with statistic']:7.2f} ms, {ms['without']:7.2f} without "
            f"the statistic and the selection: {ratio:.3f} times; selection {selection_ms:.2f} ms",
            flush=True,
        )
        rows.append(
            {
                "shape": name,
                "chunk_tokens": chunk,
                "ceiling_ms": round(ceiling_ms, 1),
                "median_ms": ms,
                "ratio": ratio,
                "selection_ms": round(selection_ms, 3),
            }
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", action="append", choices=SHAPES, help="may be repeated")
    arguments = parser.parse_args()
    rate = product_rate()
    print(f"{torch.cuda.get_device_name()}: products at {rate / 1e12:.0f} TFLOP/s", flush=True)
    rows = []
    for name in arguments.shape or ("Llama-2-13B", "Gemma-7B", "OPT-6.7B"):
        rows += measure(name, rate)
        torch.cuda.empty_cache()
    finish(
        "cuda_prefill",
        {
            "gpu": torch.cuda.get_device_name(),
            "products_teraflop_per_s": round(rate / 1e12),
            "prompt_tokens": PROMPT,
            "rows": rows,
        },
    )


if __name__ == "__main__":
    main()
