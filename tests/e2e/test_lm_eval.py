"""The command ``lm_eval``: its model ``griffin`` beside its ``hf``, on the same SmolLM2 weights."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from griffin_core import sparsify
from griffin_core.model.hub import resolve
from griffin_core.spec.choices import DEFAULT_MODEL
from griffin_evals.journal import Journal
from griffin_evals.lm import GriffinLM
from tests.servers import Process, eventually, free_port
from tests.unit.evals.requests import scoring

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(600)]

PTH = Path(__file__).parents[2] / "evals"

QUESTIONS: list[tuple[str, list[str], int]] = [
    ("Question: What falls from clouds?\nAnswer:", ["rain", "bricks", "keys"], 0),
    ("Question: What do bees make?\nAnswer:", ["bread", "honey", "silver coins"], 1),
    ("Question: Which is a fruit?\nAnswer:", ["a hammer", "a pear", "a shoe"], 1),
    ("Question: Which animal says meow?\nAnswer:", ["the cat", "the cow", "the owl"], 0),
    ("Question: How many legs has a spider?\nAnswer:", ["two", "six", "eight"], 2),
    ("Question: What is ice made of?\nAnswer:", ["water", "sand", "wool", "glass"], 0),
    ("Question: Where do fish live?\nAnswer:", ["in trees", "in the sea"], 1),
    ("Question: What do you read?\nAnswer:", ["a spoon", "a book", "a door"], 1),
    ("Question: Which is the largest?\nAnswer:", ["an ant", "a dog", "a whale"], 2),
    ("Question: What does a baker sell?\nAnswer:", ["bread", "tyres", "hats"], 0),
    ("The sun went down, so it became", ["dark.", "noisy.", "purple and square."], 0),
    ("She was thirsty, so she", ["drank a glass of water.", "painted the fence."], 0),
    ("The window was open and the wind blew, therefore", ["the papers flew away.", "it sang."], 0),
    ("He forgot his umbrella in the storm, so he", ["got wet.", "grew younger."], 0),
    ("The baby was tired, therefore", ["she wrote a letter.", "she fell asleep."], 1),
    ("Passage: Anna has a red bike.\nQuestion: is the bike red?\nAnswer:", ["no", "yes"], 1),
    ("Passage: The shop shuts at six.\nQuestion: is it open at nine?\nAnswer:", ["no", "yes"], 0),
    ("To boil an egg, put it ", ["into hot water.", "under the carpet."], 0),  # ends in a space
    ("To dry your hands, use\n", ["a towel", "a bucket of paint"], 0),
    ("naïve café — 東京 is a city in", [" Japan", " Peru", " Norway"], 0),
]

BEGINNINGS = [
    "Question: What is the capital of France?\nAnswer:",
    "Once upon a time there was a miller who had",
    "1, 2, 3, 4, 5,",
]

CHOICES_TASK = """\
task: made_up_choices
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{query}}}}"
doc_to_choice: choices
doc_to_target: gold
metric_list: [{{metric: acc}}, {{metric: acc_norm}}]
"""

COMPLETIONS_TASK = """\
task: made_up_completions
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
output_type: generate_until
doc_to_text: "{{{{query}}}}"
doc_to_target: "{{{{gold}}}}"
generation_kwargs: {{until: ["\\n", "7"], max_gen_toks: 24, do_sample: false}}
metric_list: [{{metric: exact_match}}]
"""


class Run:
    """What a run of lm_eval has written."""

    def __init__(self, directory: Path) -> None:
        (results,) = directory.rglob("results_*.json")
        self.results: dict[str, Any] = json.loads(results.read_text())
        self._directory = directory

    @property
    def figures(self) -> dict[str, Any]:
        figures: dict[str, Any] = self.results["config"]["griffin"]
        return figures

    def answers(self, task: str) -> list[Any]:
        """What the model answered: for each document, one for each of its requests."""
        return [sample["resps"] for sample in self._samples(task)]

    def asked(self, task: str) -> list[list[tuple[str, str]]]:
        """What it was asked: likewise, context and continuation."""
        return [
            [(pair["arg_0"], pair["arg_1"]) for pair in sample["arguments"].values()]
            for sample in self._samples(task)
        ]

    def _samples(self, task: str) -> list[Any]:
        (samples,) = self._directory.rglob(f"samples_{task}_*.jsonl")
        found = map(json.loads, samples.read_text().splitlines())
        return sorted(found, key=lambda sample: sample["doc_id"])

    @property
    def logprobs(self) -> list[list[float]]:
        documents = self.answers("made_up_choices")
        return [[float(answer[0][0]) for answer in answers] for answers in documents]

    @property
    def completions(self) -> list[str]:
        return [answer[0][0] for answer in self.answers("made_up_completions")]


@pytest.fixture(scope="module")
def lm_eval(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Run]:
    """Runs the command on both tasks."""
    tasks = tmp_path_factory.mktemp("tasks")
    for name, template, rows in (
        (
            "choices",
            CHOICES_TASK,
            [{"query": q, "choices": c, "gold": g} for q, c, g in QUESTIONS],
        ),
        ("completions", COMPLETIONS_TASK, [{"query": q, "gold": "-"} for q in BEGINNINGS]),
    ):
        file = tasks / f"{name}.jsonl"
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
        (tasks / f"{name}.yaml").write_text(template.format(file=file))

    def run(model: str, *arguments: str, **model_args: Any) -> Run:
        out = tmp_path_factory.mktemp("out")
        command = (
            f"import site, sys; site.addsitedir({str(PTH)!r})\n"  # as the wheel installs it
            "from lm_eval.__main__ import cli_evaluate; sys.exit(cli_evaluate())"
        )
        listed = ",".join(f"{name}={value}" for name, value in model_args.items())
        ended = subprocess.run(
            [
                *(sys.executable, "-c", command, "run"),
                *("--model", model, "--model_args", listed),
                *("--tasks", "made_up_choices,made_up_completions"),
                *("--include_path", str(tasks), "--output_path", str(out)),
                *("--log_samples", "--batch_size", "8", *arguments),
            ],
            env={**os.environ, "HF_DATASETS_CACHE": str(tasks / "cache")},
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
        assert ended.returncode == 0, ended.stderr[-4000:]
        assert "Running loglikelihood requests: 100%" in ended.stderr
        return Run(out)

    return run


@pytest.fixture(scope="module")
def weights() -> Path:
    """SmolLM2 in float32, as a directory that transformers loads."""
    return Path(resolve(DEFAULT_MODEL, torch.float32, lambda _: None))


@pytest.fixture(scope="module")
def target() -> Iterator[str]:
    with Process("--dtype", "float32", "--threads", "1") as server:
        yield server.target()


@pytest.fixture(scope="module")
def theirs(lm_eval: Callable[..., Run], weights: Path) -> Run:
    """lm-eval's own model."""
    return lm_eval("hf", "--device", "cpu", pretrained=weights, dtype="float32")


def assert_equal(one: Run, other: Run) -> None:
    for mine, others in zip(one.logprobs, other.logprobs, strict=True):
        assert mine == pytest.approx(others, abs=1e-3)
    ours, given = one.answers("made_up_choices"), other.answers("made_up_choices")
    assert [[r[0][1] for r in doc] for doc in ours] == [[r[0][1] for r in doc] for doc in given]
    assert one.completions == other.completions
    for task in ("made_up_choices", "made_up_completions"):
        assert one.results["results"][task] == other.results["results"][task]


def test_dense_over_a_server_it_is_hf(
    lm_eval: Callable[..., Run], target: str, theirs: Run
) -> None:
    assert_equal(lm_eval("griffin", target=target), theirs)


def test_dense_in_process_it_is_hf(lm_eval: Callable[..., Run], theirs: Run) -> None:
    assert_equal(lm_eval("griffin", pretrained=DEFAULT_MODEL, threads=1), theirs)


def test_chats_are_those_of_hf(lm_eval: Callable[..., Run], target: str, weights: Path) -> None:
    chat = ("--apply_chat_template", "--num_fewshot", "1", "--fewshot_as_multiturn", "true")
    chat += ("--limit", "6")
    expected = lm_eval("hf", "--device", "cpu", *chat, pretrained=weights, dtype="float32")
    served = lm_eval("griffin", *chat, target=target, tokenizer=weights)
    assert_equal(served, expected)
    for key in ("chat_template", "chat_template_sha"):
        assert served.results[key] == expected.results[key]


@torch.inference_mode()
def test_at_half_density_both_ways_are_sparsify(
    lm_eval: Callable[..., Run], target: str, weights: Path
) -> None:
    served = lm_eval("griffin", target=target, density=0.5, policy="topk")
    here = lm_eval("griffin", pretrained=DEFAULT_MODEL, threads=1, density=0.5)
    assert_equal(served, here)
    for run in (served, here):
        assert run.figures["settings"]["density"] == 0.5
        assert 0.5 < run.figures["mean_norm_mass"] < 1
        assert run.figures["fingerprint"] == served.figures["fingerprint"]

    # In float64: in float32 its own rounding settles which of two equal neurons is an expert.
    reference = AutoModelForCausalLM.from_pretrained(weights, dtype=torch.float64).eval()
    tokenizer = AutoTokenizer.from_pretrained(weights)
    for logprobs, pairs in zip(here.logprobs, here.asked("made_up_choices"), strict=True):
        context = tokenizer(pairs[0][0].rstrip()).input_ids
        with sparsify(reference, torch.tensor([context]), density=0.5):
            expected = [
                logprob(reference, context, tokenizer("".join(pair)).input_ids) for pair in pairs
            ]
        assert logprobs == pytest.approx(expected, abs=1e-3)
    for query, completion in zip(BEGINNINGS, here.completions, strict=True):
        ids = tokenizer(query, return_tensors="pt")
        with sparsify(reference, ids.input_ids, density=0.5):
            made = reference.generate(**ids, max_new_tokens=24, do_sample=False)
        text = tokenizer.decode(made[0, ids.input_ids.shape[1] :], skip_special_tokens=True)
        assert completion == text.split("\n")[0].split("7")[0]


def test_a_server_killed_in_mid_run_and_started_again_is_waited_for(
    tiny_directory: Callable[[str], Path], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    port = str(free_port())
    arguments = ("--model", str(tiny_directory("llama")), "--port", port, "--dtype", "float32")
    requests = scoring(*((f"On day {n} the council met", " to talk") for n in range(1500)))
    with ThreadPoolExecutor(1) as pool, Journal(tmp_path / "run.jsonl") as journal:
        with Process(*arguments) as server:
            lm = GriffinLM(target=server.target(), journal=journal, wait_s=100)
            answers = pool.submit(lm.loglikelihood, requests)
            eventually(lambda: len(journal) >= 50, within_s=30)
            server.kill()
        with Process(*arguments) as server:
            after = answers.result(120)
            lm.close()
    assert f"waiting for 127.0.0.1:{port} (" in capfd.readouterr().err
    assert len((tmp_path / "run.jsonl").read_text().splitlines()) == len(requests)
    here = GriffinLM(pretrained=str(tiny_directory("llama")), threads=1)
    expected = here.loglikelihood(requests)
    here.close()
    assert [a[0] for a in after] == pytest.approx([e[0] for e in expected], abs=1e-3)


HANGS = """
import sys
from griffin_evals.lm import GriffinLM
from tests.unit.evals.requests import scoring
lm = GriffinLM(target=sys.argv[1], concurrency=4)
requests = scoring(*((f"On day {n} the council met", " again" * 20) for n in range(20_000)))
print("asks", flush=True)
lm.loglikelihood(requests, disable_tqdm=True)
"""


def test_ctrl_c_ends_a_run_whose_server_hangs() -> None:
    with Process("--threads", "1") as server:
        client = subprocess.Popen(
            [sys.executable, "-c", HANGS, server.target()],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        assert client.stdout is not None and client.stdout.readline() == "asks\n"
        time.sleep(2)
        os.kill(server.pid, signal.SIGSTOP)
        try:
            client.send_signal(signal.SIGINT)
            _, said = client.communicate(timeout=30)
        finally:
            client.kill()
            os.kill(server.pid, signal.SIGCONT)
        assert "KeyboardInterrupt" in said


def logprob(reference: PreTrainedModel, context: list[int], whole: list[int]) -> float:
    """Of what follows a context."""
    first = len(context)
    logits = reference(torch.tensor([whole])).logits[0, first - 1 : -1]
    return float(logits.log_softmax(-1).gather(1, torch.tensor([whole[first:]]).T).sum())
