"""A decode step by itself, in a process of its own: no server, no client, every session greedy.

Prints one JSON object when it is ready: the machine's read or copy rate, and the ceilings. Then it
answers each line, a number of sessions, with the milliseconds of their greedy step by form of the
FF, all after the same context. ``step_ms`` is measured on the host over consecutive steps; on a GPU
``graph_ms`` is the time of replaying the step's CUDA graph alone.

    echo 4 | python -m benchmarks.step_alone --model smollm2-135m-instruct --context 160 --most 4
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
from typing import Any

import torch

from benchmarks.ceiling import step_bytes
from benchmarks.report import read_bandwidth
from benchmarks.steps import step_s, steps_of
from griffin_core.model.load import load_model

STEPS, ROUNDS = 8, 3
"""The number of steps per timing, and the number of timings, of which the median is reported."""


def replay_s(step: Any, sessions: int, form: str) -> float:
    """Returns the seconds to replay the graph of a step of ``sessions`` sessions alone."""
    size = min(size for size, _ in step.graphs if size >= sessions)
    mode = "dense" if form == "dense" else form if sessions > 1 else "private"
    graph, _ = step.graphs[size, mode]
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    times = []
    for _ in range(ROUNDS):
        torch.cuda.synchronize()
        begin.record()
        for _ in range(STEPS):
            graph.replay()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) / 1e3 / STEPS)
    return statistics.median(times)


class Alone:
    """A model, and its step in every form.

    Args:
        arguments: the parsed command line.
    """

    def __init__(self, arguments: argparse.Namespace) -> None:
        self._context, self._density = arguments.context, arguments.density
        self._cuda = arguments.device.startswith("cuda")
        self.about: dict[str, Any] = {"context": arguments.context}
        if self._cuda:
            from benchmarks import cuda_decode  # noqa: PLC0415  # needs triton

            self.about["gpu"] = torch.cuda.get_device_name()
            rate = round(cuda_decode.copy_bandwidth() / 1e9)
            self.about["copy_gigabytes_per_s"] = rate
            torch.cuda.empty_cache()
        else:
            rate = round(read_bandwidth() / 1e9, 1)
            self.about["read_gigabytes_per_s"] = rate
        if arguments.shape is not None and self._cuda:
            decoder = cuda_decode.random_decoder(arguments.shape)
        else:
            decoder = load_model(arguments.model, device=arguments.device).decoder
        most, capacity = arguments.most, self._context + 2 * STEPS
        self._steps = steps_of(decoder, sessions=most, tokens=most * capacity, sets=most + 1)
        self.about["ceiling_ms"] = {
            f"{density:g}": round(step_bytes(decoder, density, self._context) / rate / 1e6, 2)
            for density in (1.0, self._density)
        }
        self._caches = [self._steps.cache(self._context, capacity) for _ in range(most)]
        self._dense = self._steps.view(1.0, "gemv")
        self._private = [self._steps.view(self._density, "gemv") for _ in range(most)]
        self._shared = self._steps.view(self._density, "gemm")

    def measure(self, streams: int) -> dict[str, dict[str, float]]:
        """Returns the milliseconds of a step of ``streams`` sessions, by form."""
        views = {
            "dense": [self._dense] * streams,
            "shared": [self._shared if streams > 1 else self._private[0]] * streams,
            "private": self._private[:streams],
        }
        found: dict[str, dict[str, float]] = {"step_ms": {}, "graph_ms": {}}
        for form, own in views.items():
            seconds = statistics.median(
                step_s(
                    self._steps.step,
                    self._caches[:streams],
                    own,
                    context=self._context,
                    steps=STEPS,
                )
                for _ in range(ROUNDS + 1)
            )
            found["step_ms"][form] = 1e3 * seconds
            if self._cuda:
                try:
                    found["graph_ms"][form] = 1e3 * replay_s(self._steps.step, streams, form)
                except (KeyError, ValueError):
                    continue  # a step of this form has no graph
        return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", required=True)
    parser.add_argument("--shape", help="random weights of this shape, made here on the GPU")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--context", type=int, required=True, help="tokens before the step")
    parser.add_argument("--most", type=int, required=True, help="most sessions that are asked for")
    parser.add_argument("--density", type=float, default=0.5)
    answers = os.fdopen(os.dup(1), "w")
    arguments = parser.parse_args()
    os.dup2(2, 1)  # standard output is only for answers
    alone = Alone(arguments)
    print(json.dumps(alone.about), file=answers, flush=True)
    for line in sys.stdin:
        print(json.dumps(alone.measure(int(line))), file=answers, flush=True)


if __name__ == "__main__":
    main()
