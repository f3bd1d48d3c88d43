"""SmolLM2 through gRPC against transformers: token for token, and log-probability for
log-probability."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from griffin_client import GriffinClient
from griffin_core.model.hub import DEFAULT_MODEL, resolve
from griffin_core.model.load import Model
from tests.e2e.texts import ARTICLE, LICENCE, cut
from tests.servers import Process, Running

GREEDY_64 = {"max_tokens": 64}

PROMPTS: dict[str, Any] = {
    "1 token": ("Hello", 1),
    "5 tokens": ("The capital of France is", 5),
    "40 tokens": (ARTICLE, 40),
    "400 tokens": (ARTICLE, 400),
    "1500 tokens": (LICENCE, 1500),
    "chat": [
        ("system", "You answer in one sentence."),
        ("user", "Why is the sky blue?"),
        ("assistant", "Air scatters blue light most."),
        ("user", "And why is a sunset red?"),
    ],
    "other scripts": "Привет, как дела? 今日は天気がいい。 مرحبا بالعالم. नमस्ते दुनिया। Γειά σου",
    "emoji": "👩‍🚀🚀 launched at dawn 🌅 and the crowd 👏👏🏽 cheered: 🎉",
}


def prompt_ids(name: str, model: Model) -> list[int]:
    prompt = PROMPTS[name]
    if isinstance(prompt, list):
        return model.tokenizer.encode_chat(prompt)
    if isinstance(prompt, tuple):
        return cut(*prompt, model.tokenizer)
    return model.tokenizer.encode(prompt)


def as_input(name: str, model: Model) -> dict[str, Any]:
    """The prompt as a client would give it."""
    prompt = PROMPTS[name]
    if isinstance(prompt, list):
        return {"messages": prompt}
    if isinstance(prompt, tuple):
        return {"token_ids": prompt_ids(name, model)}
    return {"prompt": prompt}


@pytest.fixture(scope="module")
def reference() -> PreTrainedModel:
    where = resolve(DEFAULT_MODEL, torch.float32, print)
    return AutoModelForCausalLM.from_pretrained(where, dtype=torch.float32).eval()


Greedy = Callable[[str, tuple[int, ...]], tuple[int, ...]]


@pytest.fixture(scope="module")
def greedy(reference: PreTrainedModel, smollm2: Model) -> Greedy:
    """Returns what transformers generates after a prompt, given what a server made of it. One pass
    over both finds the token that transformers draws after each of them. The result is equal to
    what the server made if, and only if, transformers generates the same on its own."""
    ends = reference.generation_config.eos_token_id
    ends = {ends} if isinstance(ends, int) else set(ends)

    @functools.cache
    @torch.inference_mode()
    def generated(name: str, made: tuple[int, ...]) -> tuple[int, ...]:
        ids = torch.tensor([[*prompt_ids(name, smollm2), *made]])
        logits = reference(ids, logits_to_keep=len(made) + 1).logits[0]
        drawn = logits.argmax(dim=1).tolist()[: GREEDY_64["max_tokens"]]
        end = next((at for at, token in enumerate(drawn, start=1) if token in ends), None)
        return tuple(drawn[:end])

    return generated


@pytest.fixture(scope="module")
def split() -> Iterator[GriffinClient]:
    """A client of a decode process that pulls from a prefill process."""
    common = ("--dtype", "float32", "--density", "1.0", "--sharing", "private")
    with (
        Process("--role", "prefill", *common) as prefill,
        Process(
            *("--role", "decode", "--prefill-target", prefill.target()),
            *("--local-prefill-max-tokens", "0"),
            *common,
        ) as decode,
        GriffinClient(decode.target()) as client,
    ):
        yield client


@pytest.mark.timeout(300)
@pytest.mark.parametrize("name", PROMPTS)
def test_one_process_generates_what_transformers_does(
    name: str, smollm2: Model, smollm2_server: Running, greedy: Greedy
) -> None:
    with smollm2_server.client() as client:
        made = client.complete(**as_input(name, smollm2), **GREEDY_64)
    assert made.started.prompt_tokens == len(prompt_ids(name, smollm2))
    assert made.token_ids == greedy(name, made.token_ids)
    assert made.text == smollm2.tokenizer.decode(
        [token for token in made.token_ids if token not in smollm2.eos_ids]
    )


@pytest.mark.timeout(300)
@pytest.mark.parametrize("name", PROMPTS)
def test_two_processes_generate_what_transformers_does(
    name: str, smollm2: Model, split: GriffinClient, greedy: Greedy
) -> None:
    made = split.complete(**as_input(name, smollm2), **GREEDY_64)
    assert made.token_ids == greedy(name, made.token_ids)


@pytest.mark.parametrize(
    "pruning",
    [
        {"density": 0.5},
        {"density": 0.3, "policy": "topk_sampled"},
        pytest.param({"density": 0.5, "policy": "sampled"}, marks=pytest.mark.e2e),
        pytest.param({"density": 0.5, "policy": "random"}, marks=pytest.mark.e2e),
        pytest.param({"density": 0.75, "policy": "magnitude"}, marks=pytest.mark.e2e),
    ],
    ids=str,
)
def test_split_and_in_process_give_the_same_tokens_for_the_same_seed_and_so_do_two_runs(
    pruning: dict[str, Any], smollm2: Model, smollm2_server: Running, split: GriffinClient
) -> None:
    sampling = {"temperature": 1.0, "top_p": 0.95, "seed": 11}
    ids = cut(ARTICLE, 200, smollm2.tokenizer)
    stopping = {"max_tokens": 16, "ignore_eos": True}
    with smollm2_server.client() as client:
        runs = [
            each.complete(token_ids=ids, **sampling, **stopping, **pruning)
            for each in (client, client, split, split)
        ]
        other = client.complete(token_ids=ids, temperature=1.0, seed=12, **stopping, **pruning)
    assert len({run.token_ids for run in runs}) == 1
    assert len({run.finished.pruning.norm_mass for run in runs}) == 1
    assert other.token_ids != runs[0].token_ids


def test_scores_are_transformers_log_probabilities(
    reference: PreTrainedModel, smollm2: Model, smollm2_server: Running
) -> None:
    cases = [
        ("The capital of France is", " Paris."),
        ("The capital of France is", " a purple elephant."),
        (ARTICLE[:800], ARTICLE[800:1400]),
        ("x", " y"),
    ]
    with smollm2_server.client() as client:
        scores = [client.score(*case, density=1.0) for case in cases]
        as_ids = client.score(*[smollm2.tokenizer.encode(part) for part in cases[0]], density=1.0)
    assert as_ids.tokens == scores[0].tokens
    for (context, continuation), score in zip(cases, scores, strict=True):
        start = len(smollm2.tokenizer.encode(context))
        ids = torch.tensor(smollm2.tokenizer.encode(context + continuation))
        with torch.inference_mode():
            logits = reference(ids[None]).logits[0, start - 1 : -1]
        logprobs = logits.log_softmax(dim=1).gather(1, ids[start:, None])[:, 0]
        assert [token.id for token in score.tokens] == ids[start:].tolist()
        torch.testing.assert_close(
            torch.tensor([token.logprob for token in score.tokens]), logprobs, atol=1e-3, rtol=1e-4
        )
        assert score.logprob == pytest.approx(logprobs.sum().item(), abs=1e-2, rel=1e-4)
        greedy = (logits.argmax(dim=1) == ids[start:]).tolist()
        assert [token.greedy for token in score.tokens] == greedy
        assert score.greedy == all(greedy)
    assert any(token.greedy for token in scores[0].tokens)
    assert not scores[1].greedy


@pytest.mark.e2e
def test_a_chat_of_ten_turns_is_ten_calls_with_the_whole_transcript(
    smollm2_server: Running, smollm2: Model
) -> None:
    asked = [f"Name {n} things that {what}." for n in (2, 3) for what in ("fly", "burn", "sing")]
    asked += ["Say it again.", "Shorter.", "Why?", "Thank you."]
    stopping = {"max_tokens": 12}
    transcript: list[int] = []
    session = None
    with smollm2_server.client() as client:
        for words in asked:
            turn = smollm2.tokenizer.encode(f"<|im_start|>user\n{words}<|im_end|>\n")
            turn += smollm2.tokenizer.encode("<|im_start|>assistant\n")
            reply = client.complete(
                token_ids=turn, session_id=session, keep_session=True, **stopping
            )
            session = reply.started.session_id
            transcript += turn
            whole = client.complete(token_ids=transcript, **stopping)
            assert reply.token_ids == whole.token_ids
            transcript += reply.token_ids
        assert client.get_session(session).context_tokens == len(transcript)
        client.close_session(session)
