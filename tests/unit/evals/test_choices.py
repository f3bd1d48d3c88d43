"""What a question with choices measures: lm-eval's own accuracies, and bits a byte."""

from __future__ import annotations

import math
import random

import pytest
from datasets import Dataset
from lm_eval.api.task import ConfigurableTask

from griffin_evals.tasks.metrics import BITS, choice


def document(draw: random.Random) -> dict[str, object]:
    choices = ["ja " * draw.randrange(1, 9) + "ß" * draw.randrange(3) for _ in range(4)]
    return {"query": "?", "choices": choices, "gold": draw.randrange(4)}


def test_accuracies_are_those_of_lm_eval() -> None:
    draw = random.Random(0)
    documents = [document(draw) for _ in range(50)]
    task = ConfigurableTask(
        config={
            "task": "theirs",
            "custom_dataset": lambda **_: {"test": Dataset.from_list(documents)},
            "test_split": "test",
            "output_type": "multiple_choice",
            "doc_to_text": "query",
            "doc_to_choice": "choices",
            "doc_to_target": "gold",
            "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
        }
    )
    differ = 0
    for each in documents:
        results = [(-draw.choice((3.0, 9.0, 9.0, 20.0)), False) for _ in range(4)]  # ties as well
        theirs, ours = task.process_results(each, results), choice(each, results)
        assert (ours["acc"], ours["acc_norm"]) == (theirs["acc"], theirs["acc_norm"])
        differ += ours["acc"] != ours["acc_norm"]
    assert differ  # lengths played a part


def test_bits_a_byte_are_of_the_right_choice_and_count_bytes_of_utf_8() -> None:
    each = {"choices": ["no", "ß!"], "gold": 1}
    found = choice(each, [(-1.0, True), (-3.0 * math.log(2), False)])
    assert found == {"acc": 0.0, "acc_norm": 0.0, BITS: pytest.approx(1.0)}
