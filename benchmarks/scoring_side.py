"""One side of ``benchmarks.scoring``. It has its own process, since two that multiply matrices in
one process would slow each other down.

Run as ``python -m benchmarks.scoring_side hf|griffin DIRECTORY THREADS``. Answers each line
``{"items": [[context, [continuation, ...]], ...], "batch_size": n}`` with ``{"seconds": s,
"scores": [[[logprob, tokens], ...], ...], "context_tokens": [...]}``; the griffin side takes the
mode and the density, too, and needs no batch size. hf does not report the number of tokens.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from typing import Any

import torch

from griffin_core import LLM

Answer = Callable[[dict[str, Any]], dict[str, Any]]


def hf(directory: str) -> Answer:
    """Answers with lm-eval's own model for transformers."""
    from lm_eval.api.instance import Instance  # noqa: PLC0415  # takes seconds
    from lm_eval.models.huggingface import HFLM  # noqa: PLC0415

    model = HFLM(pretrained=directory, dtype="float32", device="cpu", batch_size=1)

    def answer(question: dict[str, Any]) -> dict[str, Any]:
        model.batch_size_per_gpu = question["batch_size"]
        items = question["items"]
        requests = [
            Instance("loglikelihood", {}, (context, one), 0)
            for context, continuations in items
            for one in continuations
        ]
        clock = time.perf_counter()
        found = iter(model.loglikelihood(requests, disable_tqdm=True))
        seconds = time.perf_counter() - clock
        scores = [[[next(found)[0], None] for _ in continuations] for _, continuations in items]
        return {"seconds": seconds, "scores": scores}

    return answer


def griffin(directory: str) -> Answer:
    """Answers with ``LLM.score_choices``."""
    llm = LLM(directory, dtype="float32", threads=torch.get_num_threads())

    def answer(question: dict[str, Any]) -> dict[str, Any]:
        clock = time.perf_counter()
        scored = llm.score_choices(
            question["items"], mode=question["mode"], density=question["density"]
        )
        seconds = time.perf_counter() - clock
        return {
            "seconds": seconds,
            "scores": [[[one.logprob, len(one.tokens)] for one in item] for item in scored],
            "context_tokens": [item[0].context_tokens for item in scored],
        }

    return answer


def main() -> None:
    side, directory, threads = sys.argv[1:]
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever else is printed
    torch.set_num_threads(int(threads))
    answer = {"hf": hf, "griffin": griffin}[side](directory)
    for line in sys.stdin:
        print(json.dumps(answer(json.loads(line))), file=answers, flush=True)


if __name__ == "__main__":
    main()
