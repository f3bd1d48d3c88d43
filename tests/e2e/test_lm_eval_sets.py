"""lm-eval's model ``griffin`` beside its ``hf`` on sets of your own, SmolLM2 in float32.

``GRIFFIN_TEST_SETS`` names a directory of JSON lines; of each file whose rows have ``query``,
``choices`` and ``gold``, the first ``GRIFFIN_TEST_ITEMS`` rows (200) are scored, and of all of them
together 50 queries are completed. Prints items per second.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from lm_eval.models.huggingface import HFLM
from transformers import AutoModelForCausalLM, AutoTokenizer

from griffin_core import sparsify
from griffin_core.model.hub import resolve
from griffin_core.spec.choices import DEFAULT_MODEL
from griffin_evals.lm import GriffinLM
from tests.servers import Process
from tests.unit.evals.requests import completing, scoring

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3600)]

ITEMS = int(os.environ.get("GRIFFIN_TEST_ITEMS", "200"))
THREADS = int(os.environ.get("OMP_NUM_THREADS", "2"))
HF_BATCHES = (8, 1, 32)
"""The others are tried on the smallest set, to time ``hf`` at its best."""

Row = dict[str, Any]


@pytest.fixture(scope="module")
def sets() -> dict[str, list[Row]]:
    """Name -> rows."""
    if not (given := os.environ.get("GRIFFIN_TEST_SETS")):
        pytest.skip("GRIFFIN_TEST_SETS names no directory")
    found = {}
    for path in sorted(Path(given).glob("*.jsonl")):
        rows = [json.loads(line) for line in path.read_text("utf-8").splitlines()]
        if all({"query", "choices", "gold"} <= row.keys() for row in rows):
            found[path.stem] = rows[:ITEMS]
    assert found, f"{given} has no set of query, choices and gold"
    return found


@pytest.fixture(scope="module")
def weights() -> str:
    return resolve(DEFAULT_MODEL, torch.float32, lambda _: None)


@pytest.fixture(scope="module")
def models(weights: str) -> Iterator[dict[str, GriffinLM]]:
    with Process("--dtype", "float32", "--threads", str(THREADS)) as server:
        made = {
            "in process": GriffinLM(pretrained=DEFAULT_MODEL, threads=THREADS),
            "server": GriffinLM(target=server.target()),
        }
        yield made
        for lm in made.values():
            lm.close()


@pytest.fixture(scope="module")
def hf(weights: str) -> HFLM:
    torch.set_num_threads(THREADS)
    return HFLM(pretrained=weights, dtype="float32", device="cpu", batch_size=HF_BATCHES[0])


def requests_of(rows: list[Row]) -> list[Any]:
    return scoring(*((row["query"], f" {choice}") for row in rows for choice in row["choices"]))


def by_item(rows: list[Row], answers: list[Any]) -> list[list[float]]:
    """For each row the log-likelihoods of its choices."""
    logprobs = iter([logprob for logprob, _ in answers])
    return [[next(logprobs) for _ in row["choices"]] for row in rows]


def choices_of(items: list[list[float]]) -> list[int]:
    return [max(range(len(item)), key=item.__getitem__) for item in items]


def timed(words: str, count: int, run: Callable[[], Any]) -> Any:
    began = time.monotonic()
    answers = run()
    took = time.monotonic() - began
    print(f"{words}: {count} items in {took:.1f} s, {count / took:.2f} items/s", flush=True)
    return answers


def test_every_dense_choice_is_that_of_hf(
    sets: dict[str, list[Row]], models: dict[str, GriffinLM], hf: HFLM
) -> None:
    smallest = min(sets, key=lambda name: len(json.dumps(sets[name])))
    for name, rows in sets.items():
        requests = requests_of(rows)
        for batch_size in HF_BATCHES if name == smallest else HF_BATCHES[:1]:
            hf.batch_size_per_gpu = batch_size
            answers = timed(
                f"{name}, hf at batch size {batch_size}",
                len(rows),
                lambda requests=requests: hf.loglikelihood(requests, disable_tqdm=True),
            )
        expected = by_item(rows, answers)
        gold = [row["gold"] for row in rows]
        for words, lm in models.items():
            answers = timed(
                f"{name}, griffin, {words}",
                len(rows),
                lambda lm=lm, requests=requests: lm.loglikelihood(requests, disable_tqdm=True),
            )
            items = by_item(rows, answers)
            apart = max(
                abs(a - b)
                for ours, theirs in zip(items, expected, strict=True)
                for a, b in zip(ours, theirs, strict=True)
            )
            right = sum(a == b for a, b in zip(choices_of(items), gold, strict=True))
            print(f"{name}, {words}: accuracy {right / len(rows):.3f}, {apart:.1e} apart at most")
            assert choices_of(items) == choices_of(expected)
            assert apart < 1e-3


def test_fifty_completions_are_those_of_hf(
    sets: dict[str, list[Row]], models: dict[str, GriffinLM], hf: HFLM
) -> None:
    most = -(-50 // len(sets))
    queries = [row["query"] for rows in sets.values() for row in rows[:most]][:50]
    requests = completing(*queries, until=["\n\n"], max_gen_toks=48)
    hf.batch_size_per_gpu = HF_BATCHES[0]
    expected = hf.generate_until(requests, disable_tqdm=True)
    for words, lm in models.items():
        completions = timed(
            f"completions, griffin, {words}",
            len(queries),
            lambda lm=lm: lm.generate_until(requests, disable_tqdm=True),
        )
        assert completions == expected


@torch.inference_mode()
def test_at_half_density_every_choice_is_that_of_sparsify(
    sets: dict[str, list[Row]], models: dict[str, GriffinLM], weights: str
) -> None:
    # In float64: in float32 its own rounding settles which of two equal neurons is an expert.
    reference = AutoModelForCausalLM.from_pretrained(weights, dtype=torch.float64).eval()
    tokenizer = AutoTokenizer.from_pretrained(weights)
    for name, rows in sets.items():
        few = rows[: max(1, ITEMS // 10)]
        expected = []
        for row in few:
            context = row["query"].rstrip()
            ids = tokenizer(context).input_ids
            item = []
            with sparsify(reference, torch.tensor([ids]), density=0.5):
                for choice in row["choices"]:
                    whole = tokenizer(f"{row['query']} {choice}").input_ids
                    logits = reference(torch.tensor([whole])).logits[0, len(ids) - 1 : -1]
                    after = torch.tensor([whole[len(ids) :]]).T
                    item.append(float(logits.log_softmax(-1).gather(1, after).sum()))
            expected.append(item)
        for lm in models.values():
            half = lm.with_settings(density=0.5)
            items = by_item(few, half.loglikelihood(requests_of(few), disable_tqdm=True))
            assert choices_of(items) == choices_of(expected), name
            assert items == [pytest.approx(item, abs=1e-3) for item in expected], name
