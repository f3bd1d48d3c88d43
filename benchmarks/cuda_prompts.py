"""First tokens on one GPU: how long an engine takes until several prompts that arrive together all
have their first token. The default model is Llama-3-8B's shape with random weights.

Prints first how long the GPU's matrix products and reading the weights once take: no pass can be
faster than the larger of both. Each row also shows the time of the passes alone, without an engine
and without graphs: the host's time to launch them, and the device's time to run them.
"""

from __future__ import annotations

import argparse
import statistics
import time
from dataclasses import dataclass
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks.ceiling import attention_weights
from benchmarks.cuda_decode import SHAPES, copy_bandwidth, random_decoder
from benchmarks.cuda_prefill import product_rate
from benchmarks.report import finish
from griffin_core.engine.engine import Engine
from griffin_core.engine.events import Failed, TokensMade
from griffin_core.engine.limits import Limits
from griffin_core.engine.task import GenerateTask, PruningParams
from griffin_core.experts.selection import Selection
from griffin_core.forward.prefill import MAX_TOGETHER, launch
from griffin_core.forward.prompt import (
    Part,
    Prompt,
)
from griffin_core.kv.pool import kv_bytes
from griffin_core.model.decoder import Decoder
from griffin_core.model.load import Model
from griffin_core.sampling.stopping import StoppingParams
from griffin_core.text.tokenizer import Tokenizer
from tests.tiny import byte_tokenizer
from tests.unit.core.engines import Inbox

WORKLOADS = ((1, 128), (1, 2048), (16, 512), (16, 2048))
"""Pairs of the number of prompts and the tokens of each."""


@dataclass(frozen=True, kw_only=True)
class Alone:
    """The milliseconds of passes without an engine.

    Args:
        host: until the last kernel was launched.
        device: until the last kernel was done.
    """

    host: float
    device: float


def token_ids(tokens: int, number: int) -> tuple[int, ...]:
    """Returns the ids of a prompt; no two prompts of a workload begin alike."""
    return tuple(1000 + (number + step) % 20000 for step in range(tokens))


def engine_ms(engine: Engine, prompts: int, tokens: int, density: float) -> float:
    """Returns the milliseconds from the first call until the last prompt has its first token."""
    tasks = [
        GenerateTask(
            prompt=token_ids(tokens, number),
            stopping=StoppingParams(max_tokens=1, ignore_eos=True),
            pruning=PruningParams(density=density),
        )
        for number in range(prompts)
    ]
    inboxes = [Inbox() for _ in tasks]
    clock = time.perf_counter()
    for task, inbox in zip(tasks, inboxes, strict=True):
        engine.submit(task, inbox)
    for inbox in inboxes:
        event = inbox.until(TokensMade)
        if isinstance(event, Failed):
            raise event.error
    seconds = time.perf_counter() - clock
    for task in tasks:
        engine.cancel(task.turn_id)
    while engine.sessions().result(60):
        pass
    return 1e3 * seconds


@torch.inference_mode()
def run_passes(
    decoder: Decoder, prompts: int, tokens: int, density: float, chunk_tokens: int
) -> Alone:
    """Reads prompts in passes, one prompt after the other within a pass, and runs the head."""
    began, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    began.record()
    host = 0.0
    waiting = [
        Prompt(decoder, token_ids(tokens, number), Selection(density=density))
        for number in range(prompts)
    ]
    while waiting:
        clock = time.perf_counter()
        room, parts = chunk_tokens, []
        for prompt in waiting[:MAX_TOGETHER]:
            if room:
                parts.append(Part(prompt=prompt, tokens=min(prompt.left, room)))
                room -= parts[-1].tokens
        launched = launch(decoder, parts)
        host += time.perf_counter() - clock
        read = launched.end()
        if read:
            hidden = torch.stack([each.finished.last_hidden for each in read])
            decoder.head(hidden.to(decoder.dtype)).argmax(dim=1).tolist()
        waiting = [prompt for prompt in waiting if prompt.left]
    ended.record()
    ended.synchronize()
    return Alone(host=1e3 * host, device=began.elapsed_time(ended))


def show_profile(decoder: Decoder, tokens: int, density: float, chunk_tokens: int) -> None:
    """Prints a profile of one prompt, on the host and on the device."""
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiled:
        run_passes(decoder, 1, tokens, density, chunk_tokens)
    averages = profiled.key_averages()
    print(f"\none prompt of {tokens} tokens, by the host's time:")
    print(averages.table(sort_by="self_cpu_time_total", row_limit=25, max_name_column_width=60))
    print("by the device's time:")
    print(averages.table(sort_by="self_cuda_time_total", row_limit=20, max_name_column_width=60))


def measure(model: Model, arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Returns a row for each workload."""
    decoder, chunk_tokens = model.decoder, arguments.chunk_tokens
    workloads = arguments.prompts or WORKLOADS
    most = max(prompts for prompts, _ in workloads)
    tokens = max(prompts * (tokens + 1) for prompts, tokens in workloads)
    limits = Limits(
        max_sessions=most,
        chunk_tokens=chunk_tokens,
        session_bytes=2 * kv_bytes(decoder.spec, decoder.dtype, tokens) + (8 << 30),
    )
    engine = Engine(model, limits=limits, cuda_graphs=arguments.graphs)
    engine.start()
    rows = []
    try:
        engine.ready.result(300)
        for prompts, tokens in workloads:
            shape = prompts, tokens, arguments.density
            for _ in range(2):  # warm-up: compiles kernels and allocates pinned memory
                engine_ms(engine, *shape)
                run_passes(decoder, *shape, chunk_tokens)
            served = [engine_ms(engine, *shape) for _ in range(arguments.rounds)]
            alone = [run_passes(decoder, *shape, chunk_tokens) for _ in range(arguments.rounds)]
            row = {
                "prompts": prompts,
                "tokens_each": tokens,
                "engine_ms": round(statistics.median(served), 2),
                "passes_ms": round(statistics.median(each.device for each in alone), 2),
                "launch_ms": round(statistics.median(each.host for each in alone), 2),
            }
            row["tokens_per_s"] = round(1e3 * prompts * tokens / row["engine_ms"])
            rows.append(row)
            print(
                f"{prompts:3} x {tokens:5}: {row['engine_ms']:8.2f} ms to the last first token, "
                f"{row['tokens_per_s']} tokens/s; passes alone {row['passes_ms']:.2f}, of which "
                f"the host launches for {row['launch_ms']:.2f}",
                flush=True,
            )
    finally:
        engine.stop()
    return rows


def workload(text: str) -> tuple[int, int]:
    """ "16x512" -> (16, 512)."""
    prompts, _, tokens = text.partition("x")
    return int(prompts), int(tokens)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", choices=SHAPES, default="Llama-3-8B")
    parser.add_argument("--prompts", type=workload, action="append", help="16x512, repeatable")
    parser.add_argument("--density", type=float, default=1.0)
    parser.add_argument("--chunk-tokens", type=int, help="default: the backend's")
    parser.add_argument(
        "--no-graphs", dest="graphs", action="store_false", help="nor for one short prompt"
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument(
        "--profile", action="store_true", help="tables for one prompt of 128, without a graph"
    )
    arguments = parser.parse_args()
    rate, bandwidth = product_rate(), copy_bandwidth()
    torch.cuda.empty_cache()
    decoder = random_decoder(arguments.shape)
    arguments.chunk_tokens = arguments.chunk_tokens or decoder.backend.default_chunk_tokens
    spec, neurons = decoder.spec, decoder.layers[0].ff.weights
    ff = (neurons.w_in.shape[0] + 1) * spec.intermediate_size * spec.hidden_size
    weights = len(spec.layers) * (attention_weights(spec) + ff)
    read_ms = 1e3 * weights * decoder.dtype.itemsize / bandwidth
    products_ms = 2e3 * weights * arguments.chunk_tokens / rate
    print(
        f"{torch.cuda.get_device_name()}, {arguments.shape}: a pass takes no less than "
        f"{read_ms:.1f} ms to read the weights, of {arguments.chunk_tokens} tokens "
        f"{products_ms:.1f} ms for its products",
        flush=True,
    )
    model = Model(
        name=arguments.shape,
        decoder=decoder,
        tokenizer=Tokenizer(byte_tokenizer(with_template=False)),
        fingerprint="random",
        eos_ids=frozenset(),
    )
    rows = measure(model, arguments)
    if arguments.profile:
        show_profile(decoder, 128, arguments.density, arguments.chunk_tokens)
    finish(
        "cuda_prompts",
        {
            "gpu": torch.cuda.get_device_name(),
            "shape": arguments.shape,
            "density": arguments.density,
            "chunk_tokens": arguments.chunk_tokens,
            "read_weights_ms": round(read_ms, 2),
            "products_ms_of_a_chunk": round(products_ms, 2),
            "rows": rows,
        },
    )


if __name__ == "__main__":
    main()
