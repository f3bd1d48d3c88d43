"""What a request says of its tokens and its end, over gRPC, with the plain stubs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import grpc
import pytest

from griffin.v1 import generation_pb2 as pb
from griffin.v1 import generation_pb2_grpc
from griffin_core.model.load import Model
from tests.servers import Running

EOS, PAD, UNK = 257, 258, 259
PROMPT = "What comes now?"


@pytest.fixture
def stub(tiny_server: Running) -> Iterator[generation_pb2_grpc.GenerationServiceStub]:
    with grpc.insecure_channel(tiny_server.target) as channel:
        yield generation_pb2_grpc.GenerationServiceStub(channel)


@pytest.fixture
def ids(tiny: Callable[[str], Model]) -> Callable[[str], list[int]]:
    """Text -> its tokens, one for each byte."""
    return tiny("llama").tokenizer.encode


@dataclass(frozen=True, kw_only=True)
class Made:
    """A whole completion."""

    ids: list[int]
    text: str
    logprobs: list[pb.TokenLogprob]
    finished: pb.Finished

    @property
    def reason(self) -> str:
        return pb.FinishReason.Name(self.finished.reason).removeprefix("FINISH_REASON_")


Stub = generation_pb2_grpc.GenerationServiceStub
Ids = Callable[[str], list[int]]


def generate(stub: Stub, *, text: str = PROMPT, **fields: Any) -> Made:
    made: list[int] = []
    words, logprobs = "", []
    for event in stub.Generate(pb.GenerateRequest(text=text, **fields)):
        made += event.tokens.ids
        words += event.tokens.text
        logprobs += event.tokens.logprobs
    return Made(ids=made, text=words, logprobs=logprobs, finished=event.finished)


def refused(stub: Stub, **fields: Any) -> str:
    with pytest.raises(grpc.RpcError) as caught:
        generate(stub, **fields)
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    return caught.value.details()


# -- which tokens --------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_only_allowed_tokens_are_drawn(stub: Stub, ids: Ids, temperature: float) -> None:
    few = [*ids("xyz"), EOS]
    sampling = pb.Sampling(temperature=temperature, seed=1, allowed_token_ids=[*few, few[0]])
    made = generate(stub, sampling=sampling, stopping=pb.Stopping(max_tokens=30, ignore_eos=True))
    assert len(made.ids) == 30
    assert set(made.ids) <= set(few)
    assert temperature == 0 or len(set(made.ids)) > 1


def test_logprobs_are_the_models_own_whatever_is_banned(stub: Stub, ids: Ids) -> None:
    one = pb.Stopping(max_tokens=1)
    free = generate(stub, top_logprobs=20, stopping=one)
    second = free.logprobs[0].top[1]
    sampling = pb.Sampling(allowed_token_ids=[second.id])
    made = generate(stub, top_logprobs=20, stopping=one, sampling=sampling)
    assert made.ids == [second.id]
    assert made.logprobs[0].logprob == pytest.approx(second.logprob, abs=1e-5)
    assert [top.id for top in made.logprobs[0].top] == [top.id for top in free.logprobs[0].top]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_bad_words_never_come(stub: Stub, ids: Ids, temperature: float) -> None:
    """Of one token and of several, whose last is banned behind the others."""
    few = ids("abcd")
    stopping = pb.Stopping(max_tokens=80, ignore_eos=True)
    shape = {"temperature": temperature, "seed": 3, "allowed_token_ids": few}
    sampling = pb.Sampling(**shape, logit_bias={few[0]: 2.0}, bad_words=["d", "aa", "bca", "ab"])
    made = generate(stub, sampling=sampling, stopping=stopping)
    assert len(made.ids) == 80
    assert not any(word in made.text for word in ("d", "aa", "bca", "ab"))
    assert set(made.text) == set("abc") if temperature else set(made.text) <= set("abc")


def test_a_session_with_bad_words_changes_nothing_for_others(stub: Stub, ids: Ids) -> None:
    stopping = pb.Stopping(max_tokens=60, ignore_eos=True)
    usual = {"sampling": pb.Sampling(temperature=1.0, seed=5), "stopping": stopping}
    alone = generate(stub, **usual).ids
    words = pb.Sampling(temperature=1.0, seed=6, bad_words=["ab", "xyz"])
    beside = stub.Generate(pb.GenerateRequest(text=PROMPT, sampling=words, stopping=stopping))
    assert generate(stub, **usual).ids == alone
    assert sum(len(event.tokens.ids) for event in beside) == 60


# -- the end -------------------------------------------------------------------------------------


@pytest.mark.parametrize("ends", [EOS, PAD])
def test_nothing_ends_a_completion_before_its_least_tokens(stub: Stub, ids: Ids, ends: int) -> None:
    (a,) = ids("a")
    sampling = pb.Sampling(allowed_token_ids=[a, ends], logit_bias={ends: 100.0})
    stop_ids = [ends] if ends != EOS else []
    for least in (0, 1, 5):
        stopping = pb.Stopping(min_tokens=least, stop_token_ids=stop_ids)
        made = generate(stub, sampling=sampling, stopping=stopping)
        assert (made.ids, made.text) == ([a] * least + [ends], "a" * least)
        assert made.reason == "EOS"


def test_stop_strings_are_not_looked_for_before_the_least_tokens(stub: Stub, ids: Ids) -> None:
    sampling = pb.Sampling(allowed_token_ids=ids("a"))
    for least, shown in ((0, ""), (2, "a"), (5, "aaaa")):
        stopping = pb.Stopping(min_tokens=least, stop=["aa"])
        made = generate(stub, sampling=sampling, stopping=stopping)
        assert (made.text, made.reason, made.finished.stop) == (shown, "STOP_SEQUENCE", "aa")
        assert made.finished.usage.generated_tokens == len(shown) + 2


def test_a_stop_string_is_included_if_asked_for(stub: Stub, ids: Ids) -> None:
    sampling = pb.Sampling(allowed_token_ids=ids("a"))
    for include, shown in ((False, ""), (True, "aaa")):
        stopping = pb.Stopping(stop=["aaa"], include_stop_string=include)
        made = generate(stub, sampling=sampling, stopping=stopping)
        assert (made.text, made.reason, made.finished.stop) == (shown, "STOP_SEQUENCE", "aaa")


@pytest.mark.parametrize("token", [EOS, UNK])
@pytest.mark.parametrize("include", [False, True])
@pytest.mark.parametrize("skip", [None, False])
def test_a_special_token_is_a_stop_string(
    stub: Stub, ids: Ids, token: int, include: bool, skip: bool | None
) -> None:
    text = {EOS: "</s>", UNK: "<unk>"}[token]
    stopping = pb.Stopping(
        max_tokens=20,
        stop=[text],
        ignore_eos=True,
        include_stop_string=include,
        skip_special_tokens=skip,
    )
    made = generate(stub, sampling=pb.Sampling(allowed_token_ids=[token]), stopping=stopping)
    assert (made.ids, made.reason, made.finished.stop) == ([token], "STOP_SEQUENCE", text)
    assert made.text == (text if include else "")


def test_special_tokens_are_shown_if_asked_for(stub: Stub, ids: Ids) -> None:
    sampling = pb.Sampling(allowed_token_ids=[PAD])
    for skip, shown in ((None, ""), (True, ""), (False, "<pad><pad>")):
        stopping = pb.Stopping(max_tokens=2, skip_special_tokens=skip)
        assert generate(stub, sampling=sampling, stopping=stopping).text == shown


@pytest.mark.parametrize("include", [False, True])
def test_a_kept_session_goes_on_from_the_visible_text(stub: Stub, ids: Ids, include: bool) -> None:
    letters = pb.Sampling(allowed_token_ids=ids("abcdefghijklmnopqrstuvwxyz"))
    long = pb.Stopping(max_tokens=20, ignore_eos=True)
    stop = generate(stub, sampling=letters, stopping=long).text[9:11]
    stopping = pb.Stopping(max_tokens=20, stop=[stop], ignore_eos=True, include_stop_string=include)
    first = stub.Generate(
        pb.GenerateRequest(text=PROMPT, sampling=letters, stopping=stopping, keep_session=True)
    )
    events = list(first)
    session, visible = events[0].started.session_id, "".join(e.tokens.text for e in events)
    held = len(ids(PROMPT + visible))
    assert visible.endswith(stop) == include
    assert events[-1].finished.usage.context_tokens == held
    asked = pb.GetSessionRequest(session_id=session)
    assert stub.GetSession(asked).session.context_tokens == held
    kept = generate(stub, text="\nMore:", session_id=session, stopping=long)
    whole = generate(stub, text=f"{PROMPT}{visible}\nMore:", stopping=long)
    assert kept.ids == whole.ids
    assert kept.finished.usage.context_tokens == whole.finished.usage.context_tokens


# -- bad input -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sampling", "stopping", "words"),
    [
        ({"bad_words": ["x"] * 65}, {}, "sampling.bad_words: got 65 words; allowed: at most 64"),
        (
            {"bad_words": ["x", ""]},
            {},
            "sampling.bad_words[1]: got 0 characters; allowed: 1 to 256",
        ),
        ({"bad_words": ["x" * 257]}, {}, "sampling.bad_words[0]: got 257 characters"),
        ({"allowed_token_ids": range(1025)}, {}, "sampling.allowed_token_ids: got 1025 ids"),
        (
            {"allowed_token_ids": [260]},
            {},
            "sampling.allowed_token_ids[0]: got 260; allowed: [0, 260)",
        ),
        (
            {"allowed_token_ids": [EOS]},
            {"min_tokens": 1},
            "sampling.allowed_token_ids: got no token",
        ),
        ({}, {"min_tokens": 257}, "stopping.min_tokens: got 257; allowed: [0, 256]"),
        ({}, {"min_tokens": 3, "max_tokens": 2}, "stopping.min_tokens: got 3; allowed: [0, 2]"),
    ],
)
def test_bad_values_are_refused_by_name(
    stub: Stub, sampling: dict[str, Any], stopping: dict[str, Any], words: str
) -> None:
    details = refused(stub, sampling=pb.Sampling(**sampling), stopping=pb.Stopping(**stopping))
    assert details.startswith(words)


def test_a_completion_that_runs_out_of_tokens_says_so(stub: Stub, ids: Ids) -> None:
    """Which is not known before it is there."""
    (a,) = ids("a")
    sampling = pb.Sampling(allowed_token_ids=[a], bad_words=["aaa"])
    made = []
    with pytest.raises(grpc.RpcError) as caught:
        for event in stub.Generate(pb.GenerateRequest(text=PROMPT, sampling=sampling)):
            made += event.tokens.ids
    assert made == [a, a]
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert caught.value.details().startswith(
        "sampling.allowed_token_ids: got no token left to draw after 2 tokens of the completion"
    )
