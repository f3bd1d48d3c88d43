"""Text over gRPC: prompts as the client wants them made, and completions as text."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import grpc
import pytest
import torch
from tokenizers import AddedToken
from tokenizers.processors import TemplateProcessing

from griffin.v1 import generation_pb2 as pb
from griffin.v1 import generation_pb2_grpc
from griffin_core.model.load import Model, load_model
from griffin_core.text.tokenizer import Tokenizer
from tests.servers import running
from tests.tiny import CONTEXT
from tests.tokenizer_kinds import KINDS, PADDED_VOCABULARY, write_model

THINKING = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}</s>{% endfor %}"
    "{% if tools %}T{{ tools[0].n }}{% endif %}"
    "{% if add_generation_prompt %}<bot>{{ 'no' if enable_thinking == false }}{% endif %}"
)
NESTED = [1, "b", True, None]
Stub = generation_pb2_grpc.GenerationServiceStub


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Model]:
    """Kind of a tokenizer and a chat template -> a tiny llama with it, which ends nowhere."""
    loaded: dict[str, Model] = {}

    def make(kind: str, template: Any = None) -> Model:
        if kind not in loaded:
            where = write_model(kind, tmp_path_factory.mktemp("models") / kind)
            loaded[kind] = load_model(str(where), dtype=torch.float32)
        tokenizer = KINDS[kind]()
        tokenizer.chat_template = template
        return replace(loaded[kind], tokenizer=Tokenizer(tokenizer), eos_ids=frozenset())

    return make


@pytest.fixture(scope="module")
def llama2(models: Callable[..., Model]) -> Iterator[tuple[Model, Stub]]:
    model = models("llama2", THINKING)
    with (
        running(model, max_request_bytes=4 << 20) as server,
        grpc.insecure_channel(server.target) as channel,
    ):
        yield model, Stub(channel)


def prompt(stub: Stub, **fields: Any) -> list[int]:
    """The tokens that a request's prompt becomes."""
    (started, *_) = stub.AnalyzePrompt(pb.AnalyzePromptRequest(**fields))
    ids = list(started.started.token_ids)
    generated = list(stub.Generate(pb.GenerateRequest(**fields, stopping={"max_tokens": 1})))
    assert generated[0].started.prompt_tokens == len(ids)
    return ids


def refused(call: Callable[[], Any]) -> str:
    with pytest.raises(grpc.RpcError) as error:
        list(result) if hasattr(result := call(), "__iter__") else result
    assert error.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    return str(error.value.details())


def complete(stub: Stub, **fields: Any) -> tuple[list[int], str, pb.Finished]:
    ids: list[int] = []
    text = ""
    for response in stub.Generate(pb.GenerateRequest(**fields)):
        ids += response.tokens.ids
        text += response.tokens.text
    return ids, text, response.finished


def user(content: str) -> list[pb.ChatMessage]:
    return [pb.ChatMessage(role="user", content=content)]


def test_a_text_may_go_without_the_tokenizers_own_special_tokens(
    models: Callable[..., Model],
) -> None:
    model = models("llama2")
    model.tokenizer.fast.backend_tokenizer.post_processor = TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 1)]
    )
    with running(model) as server, grpc.insecure_channel(server.target) as channel:
        stub = Stub(channel)
        bare = model.tokenizer.encode("the capital", special_tokens=False)
        assert prompt(stub, text="the capital") == [1, *bare]
        assert prompt(stub, text="the capital", add_special_tokens=True) == [1, *bare]
        assert prompt(stub, text="the capital", add_special_tokens=False) == bare
        score = pb.ScoreRequest(context="the", continuation=" capital")
        with_bos = stub.Score(score)
        score.add_special_tokens = False
        without = stub.Score(score)
        assert with_bos.context_tokens == without.context_tokens + 1
        assert [token.id for token in with_bos.tokens] == [token.id for token in without.tokens]


def test_an_eos_that_the_tokenizer_puts_after_texts_is_read_and_not_scored(
    models: Callable[..., Model],
) -> None:
    model = models("llama2")
    with running(model) as server, grpc.insecure_channel(server.target) as channel:
        expected = Stub(channel).Score(pb.ScoreRequest(context="the", continuation=" capital"))
    ending = KINDS["llama2"]()
    ending.backend_tokenizer.post_processor = TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", 2)]
    )
    model = replace(model, tokenizer=Tokenizer(ending))
    bare = model.tokenizer.encode("the capital", special_tokens=False)
    with running(model) as server, grpc.insecure_channel(server.target) as channel:
        stub = Stub(channel)
        assert prompt(stub, text="the capital") == [*bare, 2]  # as in transformers
        assert prompt(stub, text="the capital", add_special_tokens=False) == bare
        score = stub.Score(pb.ScoreRequest(context="the", continuation=" capital"))
        assert [token.id for token in score.tokens] == [token.id for token in expected.tokens]
        assert score.logprob == pytest.approx(expected.logprob, abs=1e-5)
        end = stub.Score(pb.ScoreRequest(context="the", continuation=" capital</s>"))
        assert [token.id for token in end.tokens][-1] == 2  # that is what was asked for


@pytest.mark.parametrize("special", [True, False])
@pytest.mark.parametrize("text", ["<new>", "a<new>b"])
def test_a_text_with_a_token_that_the_model_lacks_is_refused(
    special: bool, text: str, models: Callable[..., Model]
) -> None:
    model = models("gpt2")
    tokenizer = KINDS["gpt2"]()
    count = PADDED_VOCABULARY - len(tokenizer)
    tokenizer.add_tokens([f"<fill{i}>" for i in range(count)])
    tokenizer.add_tokens([AddedToken("<new>", special=special, normalized=False)])
    model = replace(model, tokenizer=Tokenizer(tokenizer))
    with running(model) as server, grpc.insecure_channel(server.target) as channel:
        stub = Stub(channel)
        said = f"got {PADDED_VOCABULARY}; allowed: [0, {PADDED_VOCABULARY}), the vocabulary"
        generate = pb.GenerateRequest(text=text, stopping={"max_tokens": 1})
        analyze = pb.AnalyzePromptRequest(text=text)
        score = pb.ScoreRequest(context="the", continuation=text)
        for call in (
            lambda: stub.Generate(generate),
            lambda: stub.AnalyzePrompt(analyze),
            lambda: stub.Score(score),
        ):
            assert said in refused(call)
        never = {"bad_words": ["<new>"]}
        ids, _, _ = complete(stub, text="the", sampling=never, stopping={"max_tokens": 3})
        assert len(ids) == 3


def test_a_later_turn_is_appended_as_it_is_unless_the_request_says_otherwise(
    models: Callable[..., Model],
) -> None:
    model = models("llama2")
    model.tokenizer.fast.backend_tokenizer.post_processor = TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 1)]
    )
    one = {"max_tokens": 1}
    with running(model) as server, grpc.insecure_channel(server.target) as channel:
        stub = Stub(channel)
        sizes = []
        for added in ({}, {"add_special_tokens": False}, {"add_special_tokens": True}):
            first = pb.GenerateRequest(text="a", keep_session=True, stopping=one)
            (started, *_) = stub.Generate(first)
            *_, finished = stub.Generate(
                pb.GenerateRequest(
                    text="the", session_id=started.started.session_id, stopping=one, **added
                )
            )
            sizes.append(finished.finished.usage.context_tokens)
        assert sizes == [sizes[0], sizes[0], sizes[0] + 1]


def test_variables_of_the_template_come_with_the_request(llama2: tuple[Model, Stub]) -> None:
    model, stub = llama2

    def reads(text: str, **fields: Any) -> bool:
        ids = prompt(stub, messages=user("a"), chat_template_kwargs=fields)
        return ids == model.tokenizer.encode(text, special_tokens=False)

    assert reads("<user>a</s><bot>")
    assert reads("<user>a</s><bot>no", enable_thinking=False)
    assert reads("<user>a</s><bot>", enable_thinking=True, x=None)
    assert reads("<user>a</s>T7<bot>", tools=[{"n": 7}])
    assert reads("<user>a</s>T7.5<bot>", tools=[{"n": 7.5}])
    assert reads("<user>a</s>T{'a': [1, 'b', True, None]}<bot>", tools=[{"n": {"a": NESTED}}])


def test_the_final_message_is_continued(llama2: tuple[Model, Stub]) -> None:
    model, stub = llama2
    messages = [*user("a"), pb.ChatMessage(role="bot", content="the capital")]
    ids = prompt(stub, messages=messages, continue_final_message=True)
    assert ids == model.tokenizer.encode("<user>a</s><bot>the capital", special_tokens=False)


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"text": "a", "continue_final_message": True}, "continue_final_message"),
        ({"token_ids": [1], "continue_final_message": True}, "continue_final_message"),
        ({"text": "a", "chat_template_kwargs": {"x": 1}}, "chat_template_kwargs"),
        ({"token_ids": [1], "add_special_tokens": False}, "add_special_tokens"),
        ({"messages": user("a"), "add_special_tokens": True}, "add_special_tokens"),
        ({"messages": user("a"), "chat_template_kwargs": {"tokenize": True}}, "tokenize"),
        (
            {"messages": user("a"), "chat_template_kwargs": {"a": {"b": [1, float("nan")]}}},
            "chat_template_kwargs.a.b[1]",
        ),
        ({"messages": user("a") * (CONTEXT + 1)}, f"{CONTEXT + 1} messages"),
        ({"messages": user("漢" * 1_000_000)}, "1000015 characters"),
        ({"text": "The quick brown fox. " * 100_000}, "2100000 characters"),
        ({"token_ids": [1] * 500_000}, "100000 tokens"),
    ],
)
def test_what_cannot_be_meant_or_cannot_fit_is_refused_by_name(
    fields: dict[str, Any], field: str, llama2: tuple[Model, Stub]
) -> None:
    stub = llama2[1]
    assert field in refused(lambda: stub.Generate(pb.GenerateRequest(**fields)))
    assert field in refused(lambda: stub.AnalyzePrompt(pb.AnalyzePromptRequest(**fields)))
    assert complete(stub, text="a", stopping={"max_tokens": 1})[2].usage.generated_tokens == 1


def test_scores_that_cannot_fit_are_refused_by_name(llama2: tuple[Model, Stub]) -> None:
    stub, long = llama2[1], "The quick brown fox. " * 100_000
    for fields, field in (
        ({"context": long, "continuation": "a"}, "context"),
        ({"context": "a", "continuation": long}, "continuation"),
        ({"context_token_ids": [1] * 500_000, "continuation_token_ids": [1]}, "context_token_ids"),
        (
            {"context_token_ids": [1], "continuation_token_ids": [1] * 500_000},
            "continuation_token_ids",
        ),
    ):
        words = refused(lambda fields=fields: stub.Score(pb.ScoreRequest(**fields)))  # type: ignore[misc]
        assert words.startswith(field)
        assert f"at most {CONTEXT}" in words


def test_a_score_covers_the_continuation_whose_token_reaches_into_the_context(
    llama2: tuple[Model, Stub],
) -> None:
    model, stub = llama2
    scored = stub.Score(pb.ScoreRequest(context="the capital o", continuation="f"))
    assert "".join(model.tokenizer.decode_one(token.id) for token in scored.tokens) == "of"


def test_a_choice_that_changes_the_others_context_is_refused_by_name(
    llama2: tuple[Model, Stub],
) -> None:
    stub = llama2[1]

    def request(*texts: str) -> pb.ScoreRequest:
        choices = [pb.Continuation(text=text) for text in texts]
        return pb.ScoreRequest(context="the capital o", continuations=choices)

    for texts, place in (((" x", "f"), 1), (("f", " x", " y"), 0)):
        words = refused(lambda texts=texts: stub.Score(request(*texts)))  # type: ignore[misc]
        assert words.startswith(f"continuations[{place}]: got 'f', whose first token begins in")
        assert words.endswith("score it alone")
    alike = stub.Score(request("f", "f"))  # the context is the same for both
    alone = stub.Score(pb.ScoreRequest(context="the capital o", continuation="f"))
    for one in alike.continuations:
        assert one.logprob == pytest.approx(alone.logprob, abs=1e-5)
    assert alike.context_tokens == alone.context_tokens


@pytest.mark.parametrize(
    ("template", "words"),
    [
        (None, "no chat template"),
        ({"rag": "R"}, "there are rag"),
        ("{{ 1 + 'a' }}", "TypeError"),
        ("fixed", "does not show"),
    ],
)
def test_whether_chats_can_be_had_is_told_before_and_at_the_call(
    template: Any, words: str, models: Callable[..., Model]
) -> None:
    with (
        running(models("gemma", template)) as server,
        grpc.insecure_channel(server.target) as channel,
    ):
        stub = Stub(channel)
        assert not stub.GetModelInfo(pb.GetModelInfoRequest()).has_chat_template
        assert words in refused(lambda: stub.Generate(pb.GenerateRequest(messages=user("a"))))


def test_long_words_of_a_template_stay_an_invalid_argument(models: Callable[..., Model]) -> None:
    template = (
        "{% for m in messages %}{% if m.role == 'user' %}{{ m.content }}{% else %}"
        "{{ raise_exception('Unexpected: ' + m.content) }}{% endif %}{% endfor %}"
    )
    with (
        running(models("gemma", template)) as server,
        grpc.insecure_channel(server.target) as channel,
    ):
        stub = Stub(channel)
        for content in ("x" * 100, "x" * 5000, "漢" * 5000, "😀\n" * 2000):
            messages = [pb.ChatMessage(role="other", content=content)]
            words = refused(lambda m=messages: stub.Generate(pb.GenerateRequest(messages=m)))  # type: ignore[misc]
            assert "Unexpected: " in words


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_no_draw_ends_a_stream_and_its_text_is_the_whole_decoded(
    kind: str, models: Callable[..., Model]
) -> None:
    """Bytes that are no characters, special tokens, ids that the tokenizer does not know."""
    model = models(kind)
    rng = random.Random(0)
    with running(model) as server, grpc.insecure_channel(server.target) as channel:
        stub = Stub(channel)
        for seed in range(8):
            before = [rng.randrange(PADDED_VOCABULARY) for _ in range(rng.randrange(1, 9))]
            biased = {token: 100.0 for token in rng.sample(range(PADDED_VOCABULARY), 40)}
            ids, text, finished = complete(
                stub,
                token_ids=before,
                sampling={"seed": seed, "temperature": 1.0, "logit_bias": biased},
                stopping={"max_tokens": 60},
            )
            assert (len(ids), finished.reason) == (60, pb.FINISH_REASON_MAX_TOKENS)
            base, whole = model.tokenizer.decode(before), model.tokenizer.decode(before + ids)
            same = next(n for n in range(len(base), -1, -1) if whole.startswith(base[:n]))
            assert text == whole[same:].removeprefix("\ufffd" * len(base[same:].encode()))


def test_the_first_blank_of_a_completion_is_given_in_each_turn(llama2: tuple[Model, Stub]) -> None:
    model, stub = llama2
    letter = model.tokenizer.encode("a")[-1]
    word = next(i for i in range(339) if model.tokenizer.decode([letter, i]) == "a of")
    session = ""
    for _ in range(3):
        ids, text, finished = complete(
            stub,
            text="the capital",
            sampling={"logit_bias": {word: 100.0}},
            stopping={"max_tokens": 2},
            keep_session=True,
            session_id=session,
        )
        assert (ids, text) == ([word, word], " of of")
        session = stub.ListSessions(pb.ListSessionsRequest()).sessions[-1].session_id
        assert finished.session_kept


def test_texts_that_cannot_fit_do_not_hold_up_others(llama2: tuple[Model, Stub]) -> None:
    stub = llama2[1]
    long = "The quick brown fox. " * 150_000
    threads = [
        threading.Thread(
            target=refused, args=[lambda: stub.Generate(pb.GenerateRequest(text=long))]
        )
        for _ in range(6)
    ]
    for thread in threads:
        thread.start()
    begun = time.monotonic()
    complete(stub, text="a", stopping={"max_tokens": 1})
    assert time.monotonic() - begun < 5
    for thread in threads:
        thread.join()
