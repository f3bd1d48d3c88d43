"""Requests as lm-eval makes them, and lm-eval's own ``hf`` model to hold answers against."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import torch
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from transformers import AutoModelForCausalLM, AutoTokenizer

TEXTS = (
    "The council met on Tuesday to talk about the old bridge.",
    "Water flows\nuphill only in dreams, they say",
    "naïve café 東京 🙂",
    "a",
    "  two  blanks  ",
)


def instance(kind: str, number: int, *arguments: Any) -> Instance:
    """The request for document ``number`` of the task "made up"."""
    return Instance(
        request_type=kind,
        doc={},
        arguments=arguments,
        idx=0,
        metadata=("made up", number, 1),
    )


def scoring(*pairs: tuple[str, str]) -> list[Instance]:
    return [instance("loglikelihood", n, *pair) for n, pair in enumerate(pairs)]


def rolling(*texts: str) -> list[Instance]:
    return [instance("loglikelihood_rolling", n, text) for n, text in enumerate(texts)]


def completing(*prompts: str, **kwargs: Any) -> list[Instance]:
    return [instance("generate_until", n, prompt, dict(kwargs)) for n, prompt in enumerate(prompts)]


def hf(directory: Path, tokenizer: Any = None, **options: Any) -> HFLM:
    """lm-eval's ``hf`` in float32 on the CPU."""
    logging.getLogger("lm_eval").setLevel(logging.ERROR)  # it tells of each truncation
    return HFLM(
        pretrained=AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32),
        tokenizer=tokenizer or AutoTokenizer.from_pretrained(directory),
        batch_size=4,
        **options,
    )


def assert_close(ours: list[tuple[float, bool]], theirs: list[tuple[float, bool]]) -> None:
    """Equal log-likelihoods but for rounding, and equal verdicts."""
    assert [greedy for _, greedy in ours] == [greedy for _, greedy in theirs]
    for (mine, _), (other, _) in zip(ours, theirs, strict=True):
        assert abs(mine - other) < 1e-3
