"""Decode on one GPU: real shapes with random weights, at several densities, compared with
transformers.

Prints the GPU's copy bandwidth first: a step takes at least the time to read its weights and KV
once at that rate.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedModel

from benchmarks.ceiling import attention_weights
from benchmarks.cuda_shapes import SHAPES
from benchmarks.report import finish
from benchmarks.steps import step_s, steps_of
from griffin_core.kv.pool import kv_bytes
from griffin_core.model.decoder import Decoder
from griffin_core.model.families.registry import spec_from_config
from griffin_core.model.load import decoder_of

DTYPE = torch.bfloat16
PROMPT = 2048
DENSITIES = (1.0, 0.5, 0.25)


def copy_bandwidth() -> float:
    """Returns the bytes/s, read and written, of copying 4 GiB."""
    source = torch.randn(1 << 30, device="cuda")
    target = torch.empty_like(source)
    times = [device_s(lambda: target.copy_(source)) for _ in range(12)]
    return 2 * source.nbytes / statistics.median(times[2:])


def device_s(work: Callable[[], object]) -> float:
    """Returns the seconds between two events around some work."""
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    work()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1e3


@torch.inference_mode()
def random_decoder(name: str) -> Decoder:
    family, values = SHAPES[name]
    config = CONFIG_MAPPING[family](**values)
    with torch.device("meta"):
        module = AutoModelForCausalLM.from_config(config, dtype=DTYPE)
    state = {
        key: torch.empty(meta.shape, dtype=DTYPE, device="cuda").normal_(std=0.02)
        for key, meta in module.state_dict().items()
        if key != "lm_head.weight" or not config.tie_word_embeddings
    }
    return decoder_of(spec_from_config(config), state)


def step_bytes(decoder: Decoder, density: float, context: int, sessions: int, sets: int) -> int:
    """Returns the bytes of weights and KV that a step must read: ``sets`` expert sets, and
    everything else once."""
    spec = decoder.spec
    item = DTYPE.itemsize
    neurons = decoder.layers[0].ff.weights
    of_neuron = (neurons.w_in.shape[0] + 1) * spec.hidden_size
    neurons_read = min(1.0, density * sets) * spec.intermediate_size
    layer = attention_weights(spec) + of_neuron * neurons_read
    weights = len(spec.layers) * layer + spec.vocab_size * spec.hidden_size
    return int(weights * item) + sessions * kv_bytes(spec, DTYPE, context)


@torch.inference_mode()
def transformers_s(module: PreTrainedModel, tokens: int) -> float:
    """Returns the seconds per token of eager ``generate`` after the prompt."""
    ids = torch.full((1, PROMPT), 5, device="cuda")
    mask = torch.ones_like(ids)

    def generate(count: int) -> float:
        torch.cuda.synchronize()
        clock = time.perf_counter()
        module.generate(
            ids, attention_mask=mask, do_sample=False, max_new_tokens=count, min_new_tokens=count
        )
        torch.cuda.synchronize()
        return time.perf_counter() - clock

    generate(tokens + 1)  # its cache grows by allocations, which are slow at first
    rounds = [(generate(tokens + 1) - generate(1)) / tokens for _ in range(3)]
    return statistics.median(rounds)


def transformers_rows(name: str, tokens: int) -> dict[str, float]:
    """Returns the milliseconds per token of transformers, dense and with its FF weights replaced by
    copies of half of the neurons, as the method's reference code does."""
    family, values = SHAPES[name]
    with torch.device("cuda"):
        torch.set_default_dtype(DTYPE)
        module = AutoModelForCausalLM.from_config(CONFIG_MAPPING[family](**values)).eval()
        torch.set_default_dtype(torch.float32)
    rows = {"transformers, dense": 1e3 * transformers_s(module, tokens)}
    for part in module.modules():
        for key in ("gate_proj", "up_proj", "fc1", "down_proj", "fc2"):
            linear = getattr(part, key, None)
            if isinstance(linear, torch.nn.Linear):
                half = _half(linear, rows=key not in ("down_proj", "fc2"))
                linear.weight = torch.nn.Parameter(half, requires_grad=False)
                if linear.bias is not None and key == "fc1":
                    bias = linear.bias[: half.shape[0]].clone()
                    linear.bias = torch.nn.Parameter(bias, requires_grad=False)
    rows["transformers, copies of 0.5"] = 1e3 * transformers_s(module, tokens)
    return rows


def _half(linear: torch.nn.Linear, *, rows: bool) -> Tensor:
    w = linear.weight.data
    return (w[: w.shape[0] // 2] if rows else w[:, : w.shape[1] // 2]).clone()


def measure(name: str, bandwidth: float, arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Returns all rows of one shape."""
    before = torch.cuda.memory_allocated()
    decoder = random_decoder(name)
    resident = torch.cuda.memory_allocated() - before
    weights = step_bytes(decoder, 1.0, 0, 0, 1)
    if not CONFIG_MAPPING[SHAPES[name][0]](**SHAPES[name][1]).tie_word_embeddings:
        weights += decoder.spec.vocab_size * decoder.spec.hidden_size * DTYPE.itemsize
    print(f"\n{name}: weights take {resident / weights:.3f} times their bytes")
    lengths = [128, 2048] if arguments.long else [128]
    capacity, batch = PROMPT + max(lengths) + 8, max(arguments.batch)
    clock = time.perf_counter()
    steps = steps_of(
        decoder, sessions=batch, tokens=batch * capacity, sets=2 * batch + len(DENSITIES)
    )
    print(f"graphs captured in {time.perf_counter() - clock:.0f} s")
    found: list[dict[str, Any]] = []
    views = {density: steps.view(density, "gemv") for density in DENSITIES}
    rows: list[tuple[int, float, str, int]] = []
    for batch in arguments.batch:
        for density in DENSITIES:
            rows.append((batch, density, "shared", 128))
            if batch > 1 and density < 1.0:
                rows.append((batch, density, "private", 128))
            if batch == 1 and arguments.long:
                rows.append((batch, density, "shared", 2048))
    caches = [steps.cache(PROMPT, capacity) for _ in range(batch)]
    dense_s: dict[tuple[int, int], float] = {}
    for batch, density, sharing, tokens in rows:
        own = [
            steps.view(density, "gemv") if sharing == "private" else views[density]
            for _ in range(batch)
        ]
        step_s(steps.step, caches[:batch], own, context=PROMPT, steps=3)  # warm-up
        seconds = step_s(steps.step, caches[:batch], own, context=PROMPT, steps=tokens)
        sets = batch if sharing == "private" else 1
        moved = step_bytes(decoder, density, PROMPT + tokens // 2, batch, sets)
        if density == 1.0:
            dense_s[batch, tokens] = seconds
        row = {
            "shape": name,
            "weight_memory": round(resident / weights, 4),
            "batch": batch,
            "density": density,
            "sets": sharing if batch > 1 and density < 1.0 else "one",
            "tokens": tokens,
            "ms": round(1e3 * seconds, 3),
            "tokens_per_s": round(batch / seconds, 1),
            "gigabytes": round(moved / 1e9, 2),
            "of_bandwidth": round(moved / seconds / bandwidth, 3),
            "over_dense": round(dense_s[batch, tokens] / seconds, 3),
        }
        found.append(row)
        print(
            f"  batch {batch:2d}  density {density:4}  {row['sets']:>7}  +{tokens:<4}  "
            f"{row['ms']:7.2f} ms  {row['tokens_per_s']:7.1f} tokens/s  "
            f"{row['gigabytes']:6.2f} GB  {row['of_bandwidth']:.1%} of the bandwidth  "
            f"{row['over_dense']:.2f} x dense",
            flush=True,
        )
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", action="append", choices=SHAPES, help="may be repeated")
    parser.add_argument("--batch", type=int, action="append", help="may be repeated")
    parser.add_argument("--long", action="store_true", help="also 2048 tokens after the prompt")
    parser.add_argument("--transformers", action="store_true", help="also time transformers")
    arguments = parser.parse_args()
    arguments.batch = sorted(arguments.batch or [1])
    bandwidth = copy_bandwidth()
    print(f"{torch.cuda.get_device_name()}: copies at {bandwidth / 1e12:.2f} TB/s", flush=True)
    found = []
    others: dict[str, dict[str, float]] = {}
    for name in arguments.shape or SHAPES:
        found += measure(name, bandwidth, arguments)
        gc.collect()
        torch.cuda.empty_cache()
        if arguments.transformers:
            others[name] = {k: round(v, 2) for k, v in transformers_rows(name, 64).items()}
            print(f"  {others[name]}", flush=True)
            torch.cuda.empty_cache()
    finish(
        "cuda_decode",
        {
            "gpu": torch.cuda.get_device_name(),
            "copy_gigabytes_per_s": round(bandwidth / 1e9),
            "prompt_tokens": PROMPT,
            "rows": found,
            "transformers_ms": others,
        },
    )


if __name__ == "__main__":
    main()
