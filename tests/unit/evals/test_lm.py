"""lm-eval's model ``griffin`` beside its ``hf``, in process and over a server."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from griffin_core import sparsify
from griffin_core.model.load import Model
from griffin_core.spec.choices import DEFAULT_MODEL
from griffin_evals.backend import ScoreItem
from griffin_evals.errors import InvalidSetting, RequestRefused
from griffin_evals.lm import GriffinLM
from griffin_evals.local import LocalBackend
from griffin_evals.requests import Reader
from griffin_evals.settings import Settings
from griffin_evals.tokens import HfTokens, tokenizer_of
from tests import tokenizer_kinds
from tests.servers import Running
from tests.tiny import CONTEXT
from tests.unit.evals.requests import (
    TEXTS,
    assert_close,
    completing,
    hf,
    instance,
    rolling,
    scoring,
)


@pytest.fixture(scope="module")
def lm(tiny: Callable[[str], Model]) -> Iterator[GriffinLM]:
    made = GriffinLM(pretrained=tiny("llama"), threads=1)
    yield made
    made.close()


@pytest.fixture
def over_server(tiny_server: Running) -> Iterator[GriffinLM]:
    made = GriffinLM(target=tiny_server.target, concurrency=4)
    yield made
    made.close()


@pytest.fixture
def over_server_with_tokenizer(
    tiny_server: Running, tiny_directory: Callable[[str], Path]
) -> Iterator[GriffinLM]:
    directory = str(tiny_directory("llama"))
    made = GriffinLM(target=tiny_server.target, tokenizer=directory, concurrency=4)
    yield made
    made.close()


def some_text(draw: random.Random, words: int) -> str:
    return "".join(
        draw.choice(["the", " old", " bridge", "\n", " ", "  ", "é", "東", "🙂", ".", "1"])
        for _ in range(words)
    )


def some_pairs(count: int, words: int = 20) -> list[tuple[str, str]]:
    draw = random.Random(count)
    pairs = [
        (some_text(draw, draw.randrange(1, words)), some_text(draw, draw.randrange(1, 8)))
        for _ in range(count)
    ]
    return [(context, after) for context, after in pairs if context.strip() and after.strip()]


def silent(lm: GriffinLM, kind: str, requests: list[Any]) -> Any:
    """Answers, without a progress bar."""
    return getattr(lm, kind)(requests, disable_tqdm=True)


TOKENIZERS: dict[str, Callable[[], Any]] = {
    "smollm2": lambda: tokenizer_of(DEFAULT_MODEL),
    "gpt2": tokenizer_kinds.gpt2,
    "llama3": tokenizer_kinds.llama3,
    "llama2": tokenizer_kinds.llama2,
}


@pytest.mark.parametrize("name", TOKENIZERS)
@pytest.mark.parametrize("add_bos_token", [None, True, False])
def test_texts_become_the_tokens_that_hf_makes_of_them(
    name: str,
    add_bos_token: bool | None,
    tiny_directory: Callable[[str], Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    tokenizer = TOKENIZERS[name]()
    theirs = hf(tiny_directory("llama"), tokenizer, add_bos_token=add_bos_token)
    monkeypatch.setattr(
        theirs, "_loglikelihood_tokens", lambda requests, **_: [r[1:] for r in requests]
    )
    bos = tokenizer.bos_token or tokenizer.eos_token
    pairs = [*some_pairs(40), ("", "alone"), (f"{bos}begun", " with it"), ("", bos + "twice")]
    reader = Reader(
        settings=Settings(),
        tokens=HfTokens(tokenizer, add_bos_token=add_bos_token, chat_template_args={}),
        max_length=10_000,
        max_gen_toks=1,
        add_bos_token=add_bos_token,
    )
    expected = theirs.loglikelihood(scoring(*pairs), disable_tqdm=True)
    for request, (context, continuation) in zip(scoring(*pairs), expected, strict=True):
        if continuation:
            pair = reader.pair(request)
            assert (pair.context, pair.continuation) == (tuple(context), tuple(continuation))
        else:  # the continuation's characters are in the context's last token: hf fails there
            with pytest.raises(RequestRefused, match="has no tokens of its own"):
                reader.pair(request)


def test_dense_loglikelihoods_are_those_of_hf_also_where_they_are_cut(
    lm: GriffinLM, tiny_directory: Callable[[str], Path]
) -> None:
    long = "x" * CONTEXT
    pairs = [
        *some_pairs(20, words=150),
        ("", " empty"),
        (long, "y"),
        (long[1:], "y"),
        (long[2:], "yyy"),
        ("a", long),
    ]
    requests = scoring(*pairs)
    theirs = hf(tiny_directory("llama")).loglikelihood(requests, disable_tqdm=True)
    assert_close(silent(lm, "loglikelihood", requests), theirs)


@pytest.mark.parametrize("max_length", [None, 64])
def test_dense_rolling_loglikelihoods_are_those_of_hf(
    max_length: int | None, tiny: Callable[[str], Model], tiny_directory: Callable[[str], Path]
) -> None:
    lengths = (1, 63, 64, 65, 66, 200, CONTEXT, CONTEXT + 1, 2 * CONTEXT, 700)
    requests = rolling("", *("ab c"[n % 3] * n for n in lengths))
    theirs = hf(tiny_directory("llama"), max_length=max_length)
    lm = GriffinLM(pretrained=tiny("llama"), threads=1, max_length=max_length)
    expected = theirs.loglikelihood_rolling(requests, disable_tqdm=True)
    assert silent(lm, "loglikelihood_rolling", requests) == pytest.approx(expected, abs=1e-3)
    lm.close()


def test_greedy_completions_are_those_of_hf(
    lm: GriffinLM, tiny_directory: Callable[[str], Path]
) -> None:
    prompts = [*TEXTS, "x" * (CONTEXT - 10), "<s>y"]  # the last but one is cut to make room
    for kwargs in (
        {"until": ["\n", "E"], "max_gen_toks": 20},
        {"until": "R", "do_sample": False, "temperature": 0.7, "max_tokens": 9},
        {"until": [chr(65 + n) for n in range(20)], "max_gen_toks": 30},
        {"max_gen_toks": 12},
    ):
        requests = completing(*prompts, **kwargs)
        theirs = hf(tiny_directory("llama")).generate_until(requests, disable_tqdm=True)
        assert silent(lm, "generate_until", requests) == theirs


def test_a_server_answers_what_the_process_answers(
    lm: GriffinLM, over_server: GriffinLM, over_server_with_tokenizer: GriffinLM
) -> None:
    scores, prompts = scoring(*some_pairs(20)), completing(*TEXTS, until=["a"], max_gen_toks=8)
    for settings in (
        {"density": 1.0},
        {"density": 0.5},
        {"density": 0.5, "score_mode": "classification"},
        {"density": 0.3, "policy": "topk_sampled", "seed": 5},
    ):
        here = lm.with_settings(**settings)  # type: ignore[arg-type]  # by name
        for server in (over_server, over_server_with_tokenizer):
            there = server.with_settings(**settings)  # type: ignore[arg-type]  # by name
            assert_close(
                silent(there, "loglikelihood", scores), silent(here, "loglikelihood", scores)
            )
            assert silent(there, "generate_until", prompts) == silent(
                here, "generate_until", prompts
            )
        assert there.figures()["fingerprint"] == here.figures()["fingerprint"]
        assert there.figures()["mean_norm_mass"] == pytest.approx(here.figures()["mean_norm_mass"])


@torch.inference_mode()
def test_at_half_density_scores_and_windows_are_those_of_sparsify(
    lm: GriffinLM, tiny_directory: Callable[[str], Path]
) -> None:
    reference = AutoModelForCausalLM.from_pretrained(tiny_directory("llama"), dtype=torch.float32)

    def logprob(context: list[int], continuation: list[int]) -> float:
        ids = torch.tensor([context])
        with sparsify(reference, ids, density=0.5):
            logits = reference(torch.tensor([context + continuation])).logits[0]
        chances = logits[len(context) - 1 : -1].log_softmax(dim=-1)
        return float(chances.gather(1, torch.tensor([continuation]).T).sum())

    half = lm.with_settings(density=0.5)
    pairs = some_pairs(12)
    expected = []
    for pair in scoring(*pairs):
        read = half.reader.pair(pair)
        expected.append(logprob(list(read.context), list(read.continuation)))
    scores = [score for score, _ in silent(half, "loglikelihood", scoring(*pairs))]
    assert scores == pytest.approx(expected, abs=1e-3)

    (long,) = rolling("the old bridge " * 30)
    dense, windows = half.reader.windows(long)
    ids = half.tok_encode(long.args[0])
    assert [list(pair.continuation) for pair in dense] == [ids[: CONTEXT // 2]]
    assert [token for pair in windows for token in pair.continuation] == ids[CONTEXT // 2 :]
    (total,) = silent(half, "loglikelihood_rolling", [long])
    (of_prompt,) = silent(lm, "_loglikelihood_tokens", [(None, dense[0].context, ids[:128])])
    parts = [logprob(list(pair.context), list(pair.continuation)) for pair in windows]
    assert total == pytest.approx(of_prompt[0] + sum(parts), abs=1e-3)


def test_classification_at_density_1_takes_contexts_of_one_token(lm: GriffinLM) -> None:
    paper = lm.with_settings(score_mode="classification")
    requests = rolling("the old bridge " * 30)
    assert silent(paper, "loglikelihood_rolling", requests) == silent(
        lm, "loglikelihood_rolling", requests
    )
    assert silent(paper, "loglikelihood", scoring(("", "ab"))) == silent(
        lm, "loglikelihood", scoring(("", "ab"))
    )


def test_documents_too_short_for_pruned_windows_are_pointed_out(
    lm: GriffinLM, caplog: pytest.LogCaptureFixture
) -> None:
    half = lm.with_settings(density=0.5)
    requests = rolling("short")
    silent(lm, "loglikelihood_rolling", rolling(""))
    assert not caplog.text
    assert silent(half, "loglikelihood_rolling", requests) == silent(
        lm, "loglikelihood_rolling", requests
    )
    assert "1 of 1 documents have no more than 128 tokens" in caplog.text
    paper = half.with_settings(score_mode="classification")
    with pytest.raises(InvalidSetting, match="score_mode: got classification"):
        silent(paper, "loglikelihood_rolling", requests)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[ScoreItem]:
    """What the engine is asked to score during the test."""
    made: list[ScoreItem] = []
    score = LocalBackend.score

    def counted(backend: LocalBackend, items: Any, *rest: Any) -> None:
        made.extend(items)
        score(backend, items, *rest)

    monkeypatch.setattr(LocalBackend, "score", counted)
    return made


def test_choices_of_one_context_are_one_call_and_equal_requests_asked_once(
    lm: GriffinLM, calls: list[ScoreItem]
) -> None:
    one, two = TEXTS[:2]
    pairs = [(one, " yes"), (two, " yes"), (one, " no"), (one + " ", "yes"), (one, " yes")]
    counting = lm.with_settings()
    answers = silent(counting, "loglikelihood", scoring(*pairs))
    assert [len(item.continuations) for item in calls] == [2, 1]
    assert answers[0] == answers[3] == answers[4] != answers[2]
    assert counting.figures()["requests"] == 5


def test_first_windows_of_all_texts_are_not_one_request(
    lm: GriffinLM, calls: list[ScoreItem], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Though all have the same one token as their context."""
    monkeypatch.setattr("griffin_evals.lm.MOST_TOGETHER", 100)
    texts = [letter * 45 for letter in "abcde"] + ["x" * 200]
    together = silent(lm.with_settings(), "loglikelihood_rolling", rolling(*texts))
    assert sorted(len(item.continuations) for item in calls) == [1, 1, 2, 2]
    for text, total in zip(texts, together, strict=True):
        (alone,) = silent(lm.with_settings(), "loglikelihood_rolling", rolling(text))
        assert total == pytest.approx(alone, abs=1e-3)


@pytest.mark.parametrize("policy", ["random", "sampled", "topk_sampled"])
def test_what_is_drawn_depends_on_the_request_and_not_on_its_place(
    policy: Any, lm: GriffinLM
) -> None:
    drawing = lm.with_settings(density=0.3, policy=policy, seed=1)
    pairs = some_pairs(8)
    forwards = silent(drawing, "loglikelihood", scoring(*pairs))
    backwards = silent(drawing, "loglikelihood", scoring(*reversed(pairs)))
    assert_close(forwards, backwards[::-1])
    other = silent(drawing.with_settings(seed=2), "loglikelihood", scoring(*pairs))
    assert all(abs(a - b) > 1e-3 for (a, _), (b, _) in zip(forwards, other, strict=True))


def test_a_prompt_drawn_from_several_times_gives_different_completions_that_can_be_repeated(
    lm: GriffinLM,
) -> None:
    kwargs = {"do_sample": True, "temperature": 1.0, "max_gen_toks": 10}
    requests = completing("once", "once", "once", **kwargs)
    completions = silent(lm, "generate_until", requests)
    assert len(set(completions)) == 3
    assert silent(lm, "generate_until", requests) == completions


def test_chats_are_rendered_as_hf_does(
    lm: GriffinLM, over_server: GriffinLM, tiny_directory: Callable[[str], Path]
) -> None:
    theirs = hf(tiny_directory("llama"))
    chat = [{"role": "user", "content": "why?"}]
    begun = [*chat, {"role": "assistant", "content": "Because"}]
    assert lm.apply_chat_template(chat) == theirs.apply_chat_template(chat)
    assert lm.apply_chat_template(begun, False) == theirs.apply_chat_template(begun, False)
    assert lm.chat_template(True) == theirs.chat_template(True)
    assert lm.tokenizer_name.startswith("llama-")
    with pytest.raises(RequestRefused, match="set tokenizer=NAME"):
        over_server.apply_chat_template(chat)


@pytest.mark.parametrize(
    ("kind", "arguments", "words"),
    [
        ("loglikelihood", ("", "a"), "made up, document 7: an empty context over a server"),
        ("loglikelihood", ("  \n", "a"), "document 7: an empty context"),
        ("loglikelihood", ("a" * CONTEXT, "b"), "document 7: .*tokenizer=NAME it would be cut"),
        ("loglikelihood_rolling", ("abc",), "document 7: loglikelihood_rolling over a server"),
        ("generate_until", ("a" * CONTEXT, {}), "document 7: max_gen_toks: got 256"),
        ("generate_until", ("a" * 250, {"max_gen_toks": 9}), "document 7: .*no room for 9"),
        ("generate_until", ("a", {"num_beams": 2}), "document 7: .*got num_beams; allowed: until"),
        ("generate_until", ("", {"max_gen_toks": 2}), "document 7: the prompt is empty"),
        ("generate_until", ("a", {"max_gen_toks": 2, "top_p": 7}), "document 7: .*top_p"),
        ("generate_until", ("a", {"top_p": None}), "document 7: top_p: got None; allowed: a num"),
        ("generate_until", ("a", {"until": None}), "document 7: until: got None; allowed: str"),
        ("generate_until", ("a", {"max_gen_toks": "x"}), "document 7: generation_kwargs: .*'x'"),
    ],
)
def test_what_a_server_without_tokenizer_cannot_answer_is_refused_by_name(
    kind: str, arguments: Any, words: str, over_server: GriffinLM
) -> None:
    with pytest.raises(RequestRefused, match=words):
        silent(over_server, kind, [instance(kind, 7, *arguments)])


def test_a_request_that_cannot_be_answered_in_process_is_refused_by_name(lm: GriffinLM) -> None:
    ok = instance("generate_until", 1, "a", {"max_gen_toks": 2})
    bad = instance("generate_until", 7, "a", {"max_gen_toks": 2, "top_k": -1})
    with pytest.raises(RequestRefused, match=r"made up, document 7: .*top_k"):
        silent(lm, "generate_until", [ok, bad])
    paper = lm.with_settings(density=0.5, score_mode="classification")
    with pytest.raises(RequestRefused, match=r"made up, document 7: .*two tokens"):
        silent(paper, "loglikelihood", [instance("loglikelihood", 7, "a", "b")])


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({}, "target, pretrained: got neither"),
        ({"target": "a:1", "pretrained": "b"}, "target, pretrained: got both"),
        ({"target": "a:1", "density": 0}, r"density: got 0; allowed: \(0, 1\]"),
        ({"target": "a:1", "density": "half"}, "density: got half; allowed: a number"),
        ({"target": "a:1", "policy": "best"}, "policy: got best; allowed: topk, "),
        ({"target": "a:1", "sharing": "x"}, "sharing: got x; allowed: private"),
        ({"target": "a:1", "score_mode": "x"}, "score_mode: got x; allowed: generation, class"),
        ({"target": "a:1", "seed": -1}, "seed: got -1"),
        ({"target": "a:1", "dtype": "bfloat16"}, "dtype: got bfloat16; allowed: with pretrained"),
        ({"target": "a:1", "threads": 2}, "threads: got 2; allowed: with pretrained"),
        ({"target": "a:1", "max_length": 9}, "max_length: got 9; allowed: with pretrained or"),
        ({"target": "a:1", "concurrency": 0}, "concurrency: got 0; allowed: a whole number"),
        ({"target": "a:1", "wait_s": -1}, "wait_s: got -1"),
        ({"pretrained": "b", "tokenizer": "c"}, "tokenizer: got c; allowed: with target"),
        ({"pretrained": "b", "max_length": 1}, "max_length: got 1; allowed: a whole number >= 2"),
        ({"pretrained": "b", "max_length": "x"}, "max_length: got x; allowed: a whole number"),
        ({"target": 50051}, "target: got 50051; allowed: host:port"),
        ({"target": "a:1", "wait_s": "long"}, "wait_s: got long; allowed: seconds"),
        ({"pretrained": "b", "max_gen_toks": 0}, "max_gen_toks: got 0"),
        ({"target": "a:1", "policy": None}, "policy: got None; allowed: topk, "),
        ({"target": "a:1", "sharing": None}, "sharing: got None; allowed: private, "),
        ({"target": ""}, "target: got ''; allowed: host:port"),
        ({"pretrained": 5}, "pretrained: got 5; allowed: a name"),
        ({"pretrained": "b", "device": 0}, "device: got 0; allowed: a device's name"),
        ({"pretrained": "b", "threads": 1.5}, "threads: got 1.5; allowed: >= 1, or None"),
        ({"pretrained": "b", "add_bos_token": "yes"}, "add_bos_token: got 'yes'; allowed: True,"),
        ({"pretrained": "b", "chat_template_args": "x"}, "chat_template_args: got 'x'"),
        ({"pretrained": "b", "journal": 5}, "journal: got 5; allowed: a path"),
    ],
)
def test_arguments_are_checked_before_anything_is_loaded_or_called(
    arguments: dict[str, Any], words: str
) -> None:
    with pytest.raises(InvalidSetting, match=words):
        GriffinLM(**arguments)


def test_a_tokenizer_of_another_model_is_refused(tiny_server: Running) -> None:
    with pytest.raises(InvalidSetting, match=r"tokenizer: got smollm2.*that of the server's model"):
        GriffinLM(target=tiny_server.target, tokenizer=DEFAULT_MODEL)


def test_a_length_that_the_model_does_not_have_is_refused(tiny: Callable[[str], Model]) -> None:
    with pytest.raises(InvalidSetting, match="max_length: got 300; allowed: at most 256"):
        GriffinLM(pretrained=tiny("llama"), max_length=300)
