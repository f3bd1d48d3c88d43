"""Computes the values of a document from a model's answer: one function for each kind of task."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

from griffin_evals.tasks.columns import number

Values = dict[str, float]

BITS = "bits_per_byte"
"""Bits per byte of the right choice."""


def exp_of_mean(values: Sequence[float]) -> float:
    """Returns the perplexity, from nats."""
    return math.exp(sum(values) / len(values))


def choice(document: Mapping[str, Any], results: Sequence[tuple[float, bool]]) -> Values:
    """Multiple choice: whether the right choice has the largest log-probability, and the largest
    one per character, as in lm-eval; and the bits per byte of the right choice, which change with
    every change of the model, while an accuracy changes only where another choice wins."""
    choices: Sequence[str] = document["choices"]
    gold: int = document["gold"]
    logprobs = [logprob for logprob, _ in results]
    by_length = [logprob / len(text) for logprob, text in zip(logprobs, choices, strict=True)]
    return {
        "acc": float(_largest(logprobs) == gold),
        "acc_norm": float(_largest(by_length) == gold),
        BITS: -logprobs[gold] / (len(choices[gold].encode()) * math.log(2)),
    }


def _largest(values: Sequence[float]) -> int:
    return max(range(len(values)), key=values.__getitem__)


def last_word(document: Mapping[str, Any], results: Sequence[tuple[float, bool]]) -> Values:
    """LAMBADA: whether the last word is the most likely one, and its nats."""
    ((logprob, greedy),) = results
    return {"acc": float(greedy), "perplexity": -logprob}


def nats_per_word(document: Mapping[str, Any], results: Sequence[tuple[float, bool]]) -> Values:
    """WikiText-2: nats of a window's second part, divided by its words."""
    ((logprob, _),) = results
    return {"word_perplexity": -logprob / len(document["continuation"].split())}


@cache
def _rouge() -> Any:
    from rouge_score.rouge_scorer import RougeScorer  # noqa: PLC0415  # brings nltk

    return RougeScorer(["rouge1", "rouge2", "rougeL"], use_stemmer=True)


def rouge(document: Mapping[str, Any], results: Sequence[str]) -> Values:
    """ROUGE-1/2/L of a summary, F-measures in [0, 1], with Porter's stemmer."""
    scores = _rouge().score(document["references"][0], results[0].strip())
    return {name: score.fmeasure for name, score in scores.items()}


def first_line(text: str) -> str:
    return text.strip().split("\n")[0]


def token_f1(reference: str, answer: str) -> float:
    """F1 of common words after SQuAD's normalization."""
    from lm_eval.tasks.qasper.metrics import f1_abstractive  # noqa: PLC0415

    return float(f1_abstractive([answer], [reference]))


def exact(reference: str, answer: str) -> float:
    """1 if both are equal after SQuAD's normalization."""
    from lm_eval.tasks.qasper.metrics import normalize_answer  # noqa: PLC0415

    return float(normalize_answer(reference) == normalize_answer(answer))


def conversation(document: Mapping[str, Any], results: Sequence[str]) -> Values:
    """CoQA's own measure: with several references each is left out once, and the mean of the best
    scores against the others is taken."""
    references, answer = document["references"], first_line(results[0])
    without = [references[:i] + references[i + 1 :] for i in range(len(references))]
    groups = without if len(references) > 1 else [references]
    return {
        "f1": sum(max(token_f1(r, answer) for r in group) for group in groups) / len(groups),
        "em": sum(max(exact(r, answer) for r in group) for group in groups) / len(groups),
    }


def best_f1(document: Mapping[str, Any], results: Sequence[str]) -> Values:
    """QASPER: F1 with the closest reference."""
    answer = first_line(results[0])
    return {"f1": max(token_f1(reference, answer) for reference in document["references"])}


def final_number(document: Mapping[str, Any], results: Sequence[str]) -> Values:
    """GSM8K: whether the number after #### is the reference's."""
    return {"exact_match": float(number(results[0]) == document["references"][0])}
