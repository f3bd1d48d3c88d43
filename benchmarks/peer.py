"""A peer at work, in an interpreter of its own: peers pin torch and more to their own versions.

Run as a script by ``benchmarks.peers``, with nothing of Griffin installed. Reads lines of
``sessions prompt_tokens tokens`` and answers each with the seconds of one decode step: all sessions
together, one token each, behind prompts of their own.
"""

from __future__ import annotations

import importlib.metadata
import os
import sys
import time
from collections.abc import Callable

Step = Callable[[int, int, int], float]


def prompt(number: int, tokens: int) -> list[int]:
    """Some token ids, others for each session."""
    return [(number * 37 + index) % 40_000 + 5 for index in range(tokens)]


def llama_cpp(model: str, threads: int) -> Step:
    """llama-cpp-python: one session, evaluated a token at a time."""
    from llama_cpp import Llama  # noqa: PLC0415

    llama = Llama(model, n_ctx=2048, n_threads=threads, n_threads_batch=threads, verbose=False)

    def step(sessions: int, prompt_tokens: int, tokens: int) -> float:
        assert sessions == 1, "llama-cpp-python runs one sequence"
        llama.reset()
        llama.eval(prompt(0, prompt_tokens))
        clock = time.perf_counter()
        for token in prompt(1, tokens - 1):
            llama.eval([token])
        return (time.perf_counter() - clock) / (tokens - 1)

    return step


def vllm(model: str, threads: int) -> Step:
    """vLLM's offline engine; its prefill is measured alone and taken off."""
    os.environ.update(
        VLLM_CPU_KVCACHE_SPACE="1",
        VLLM_CPU_OMP_THREADS_BIND=f"0-{threads - 1}",
        VLLM_ENABLE_V1_MULTIPROCESSING="0",
        VLLM_LOGGING_LEVEL="ERROR",
        HF_HUB_OFFLINE="1",
    )
    from vllm import LLM, SamplingParams  # noqa: PLC0415

    engine = LLM(
        model=model,
        dtype="bfloat16",
        max_model_len=2048,
        max_num_seqs=16,
        enable_prefix_caching=False,
    )

    def generate(sessions: int, prompt_tokens: int, tokens: int) -> float:
        prompts = [{"prompt_token_ids": prompt(n, prompt_tokens)} for n in range(sessions)]
        sampling = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True)
        clock = time.perf_counter()
        engine.generate(prompts, sampling, use_tqdm=False)
        return time.perf_counter() - clock

    def step(sessions: int, prompt_tokens: int, tokens: int) -> float:
        first = generate(sessions, prompt_tokens, 1)
        return (generate(sessions, prompt_tokens, tokens) - first) / (tokens - 1)

    return step


PEERS = {"llama-cpp-python": llama_cpp, "vllm-cpu": vllm}


def main() -> None:
    """``peer.py NAME MODEL THREADS``; first says which version it is."""
    name, model, threads = sys.argv[1], sys.argv[2], int(sys.argv[3])
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever else is printed
    version = importlib.metadata.version(name)
    step = PEERS[name](model, threads)
    print(version, file=answers, flush=True)
    for line in sys.stdin:
        print(step(*map(int, line.split())), file=answers, flush=True)


if __name__ == "__main__":
    main()
