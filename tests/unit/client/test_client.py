"""The SDK: what it exports, what it needs, and what its calls raise."""

from __future__ import annotations

import asyncio
import inspect
import subprocess
import sys
from collections.abc import Callable
from dataclasses import fields
from typing import Any

import grpc
import pytest
from google.protobuf.message import Message as ProtoMessage

import griffin_client
from griffin.v1 import generation_pb2, generation_pb2_grpc
from griffin_client import (
    AnalyzeOptions,
    AsyncGriffinClient,
    DeadlineExceeded,
    Finished,
    GenerateOptions,
    GriffinClient,
    GriffinClientError,
    InvalidArgument,
    Message,
    ModelInfo,
    NotFound,
    ResourceExhausted,
    ScoreOptions,
    Started,
    Tokens,
    Unavailable,
)
from griffin_client.requests import PARTS
from griffin_client.retry import Retries
from griffin_core.model.load import Model
from tests.servers import Running, running

THREE: dict[str, Any] = {"max_tokens": 3, "ignore_eos": True}


def test_exactly_these_names_are_exported() -> None:
    """A name that leaves this list breaks somebody's import: say so in the CHANGELOG."""
    assert sorted(griffin_client.__all__) == [
        "Aborted",
        "Analysis",
        "AnalyzeOptions",
        "AsyncGriffinClient",
        "Cancelled",
        "Completion",
        "DeadlineExceeded",
        "Event",
        "FailedPrecondition",
        "Finished",
        "GenerateOptions",
        "GriffinClient",
        "GriffinClientError",
        "InvalidArgument",
        "LayerAnalysis",
        "Message",
        "ModelInfo",
        "NotFound",
        "PermissionDenied",
        "Policy",
        "PruningFigures",
        "ResourceExhausted",
        "SamplingDefaults",
        "Score",
        "ScoreMode",
        "ScoreOptions",
        "ServerFault",
        "Session",
        "Sharing",
        "Speculation",
        "SpeculationFigures",
        "Started",
        "Timings",
        "Tls",
        "TokenLogprob",
        "TokenScore",
        "Tokens",
        "TopLogprob",
        "Unauthenticated",
        "Unavailable",
        "Usage",
        "Verify",
        "__version__",
    ]
    assert all(hasattr(griffin_client, name) for name in griffin_client.__all__)


METHODS = {
    "Generate": ["generate", "stream_text", "complete"],
    "Score": ["score", "score_choices"],
    "AnalyzePrompt": ["analyze_prompt"],
    "GetModelInfo": ["model_info"],
    "GetSession": ["get_session"],
    "ListSessions": ["list_sessions"],
    "CloseSession": ["close_session"],
}


def test_every_rpc_has_its_methods_in_both_clients() -> None:
    service = generation_pb2.DESCRIPTOR.services_by_name["GenerationService"]
    assert {method.name for method in service.methods} == METHODS.keys()
    for name in [name for names in METHODS.values() for name in names]:
        ours, theirs = (
            inspect.signature(getattr(kind, name)).parameters
            for kind in (GriffinClient, AsyncGriffinClient)
        )
        assert list(ours) == list(theirs)


REQUESTS = {
    "Generate": (generation_pb2.GenerateRequest, GenerateOptions),
    "Score": (generation_pb2.ScoreRequest, ScoreOptions),
    "AnalyzePrompt": (generation_pb2.AnalyzePromptRequest, AnalyzeOptions),
}

POSITIONAL = {
    "text",
    "context",
    "context_token_ids",
    "continuation",
    "continuation_token_ids",
    "continuations",
}
"""Fields of requests that are positional arguments of methods."""


@pytest.mark.parametrize("rpc", REQUESTS)
def test_each_option_is_a_field_of_the_request_or_of_one_of_its_parts(rpc: str) -> None:
    request, options = REQUESTS[rpc]

    def names_in(message: type[ProtoMessage]) -> set[str]:
        names = {field.name for field in message.DESCRIPTOR.fields}
        return names.union(*(names_in(PARTS[part]) for part in PARTS.keys() & names))

    names = names_in(request)
    if rpc == "AnalyzePrompt":
        names.remove("sharing")  # the server refuses it
    if rpc != "Generate":
        names -= {"warmup_tokens", "checks", "agreement_floor"}  # likewise
    assert names - PARTS.keys() - POSITIONAL == options.__annotations__.keys() - {"timeout"}


def test_model_info_has_the_fields_of_its_message() -> None:
    names = {field.name for field in generation_pb2.GetModelInfoResponse.DESCRIPTOR.fields}
    assert {field.name for field in fields(ModelInfo)} == names


@pytest.mark.parametrize(
    "value", [{"a": object()}, {1: 2}, 5, "text", {"a": {"b": {3}}}, [("a", 1)]]
)
def test_what_json_cannot_hold_is_no_template_variable(value: Any) -> None:
    with (
        GriffinClient("localhost:1") as client,
        pytest.raises(InvalidArgument, match="chat_template_kwargs"),
    ):
        client.complete(messages=[("user", "hi")], chat_template_kwargs=value)


def test_sessions_are_listed_page_by_page(monkeypatch: pytest.MonkeyPatch) -> None:
    pages = {"": ["a", "b"], "next": ["c"]}

    class Stub:
        def ListSessions(self, request: Any, **options: Any) -> Any:
            return generation_pb2.ListSessionsResponse(
                sessions=[generation_pb2.Session(session_id=i) for i in pages[request.page_token]],
                next_page_token="" if request.page_token else "next",
            )

    monkeypatch.setattr(generation_pb2_grpc, "GenerationServiceStub", lambda channel: Stub())
    with GriffinClient("localhost:1") as client:
        assert [session.session_id for session in client.list_sessions()] == ["a", "b", "c"]


def test_the_sdk_needs_grpcio_protobuf_and_googleapis_alone() -> None:
    """Imports and uses it in an interpreter where nothing else can be imported."""
    code = """
import sys

class Only:
    def find_spec(self, name, path=None, target=None):
        top = name.partition(".")[0]
        allowed = {"grpc", "google", "griffin", "griffin_client", "typing_extensions"}
        if top not in allowed | sys.stdlib_module_names:
            raise ImportError(f"the client must not need {name}")

sys.meta_path.insert(0, Only())
import griffin_client
try:
    griffin_client.GriffinClient("localhost:1").complete("a", timeout=5)
except griffin_client.Unavailable:
    print("unavailable")
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False
    )
    assert (done.stdout.strip(), done.returncode) == ("unavailable", 0), done.stderr


def test_events_come_in_order(tiny_server: Running) -> None:
    with tiny_server.client() as client:
        started, *tokens, finished = client.generate("abc", **THREE)
    assert isinstance(started, Started) and isinstance(finished, Finished)
    assert [len(each.ids) for each in tokens if isinstance(each, Tokens)] == [1, 1, 1]
    assert finished.reason == "max_tokens"
    assert finished.usage.prompt_tokens == started.prompt_tokens == 3
    timings = finished.timings
    assert 0 < timings.prefill_s <= timings.first_token_s
    assert finished.tokens_per_second == pytest.approx(2 / timings.decode_s)


def test_a_completion_is_its_events_put_together(tiny_server: Running) -> None:
    with tiny_server.client() as client:
        options = {**THREE, "density": 0.5, "top_logprobs": 2}
        events = list(client.generate("abc", **options))  # type: ignore[arg-type]
        whole = client.complete("abc", **options)
    tokens = [event for event in events if isinstance(event, Tokens)]
    assert whole.text == "".join(event.text for event in tokens)
    assert whole.token_ids == tuple(token for event in tokens for token in event.ids)
    assert [len(item.top) for item in whole.logprobs] == [2, 2, 2]
    for item, token in zip(whole.logprobs, whole.token_ids, strict=True):
        assert (item.top[0].id, item.top[0].logprob) == (token, item.logprob)  # greedy


def test_inputs_of_each_kind_are_the_same_prompt(
    tiny_server: Running, tiny: Callable[[str], Model]
) -> None:
    text = "<user>hi\n<assistant>"
    with tiny_server.client() as client:
        made = [
            client.complete(text, **THREE),
            client.complete(token_ids=tiny("llama").tokenizer.encode(text), **THREE),
            client.complete(messages=[("user", "hi")], **THREE),
            client.complete(messages=[Message(role="user", content="hi")], **THREE),
            client.complete(messages=[{"role": "user", "content": "hi"}], **THREE),
        ]
    assert len({completion.token_ids for completion in made}) == 1


async def test_the_async_client_gives_what_the_sync_one_gives(tiny_server: Running) -> None:
    options = {**THREE, "density": 0.5}
    with tiny_server.client() as client:
        ours = client.complete("abc", **options)
        score = client.score("ab", "cd")
        info = client.model_info()
    async with AsyncGriffinClient(tiny_server.target) as client:
        theirs = await client.complete("abc", **options)
        assert theirs.token_ids == ours.token_ids
        assert (await client.score("ab", "cd")).tokens == score.tokens
        assert await client.model_info() == info
        kept = await client.complete("abc", keep_session=True, **options)
        session_id = kept.started.session_id
        assert [s.session_id for s in await client.list_sessions()] == [session_id]
        assert (await client.get_session(session_id)).state == "idle"
        await client.close_session(session_id)
        with pytest.raises(NotFound):
            await client.get_session(session_id)
        with pytest.raises(InvalidArgument) as caught:
            await client.complete("abc", density=2.0)
        assert list(caught.value.violations) == ["pruning.density"]


@pytest.mark.usefixtures("with_and_without_traces")
def test_a_timeout_is_a_deadline(tiny: Callable[[str], Model]) -> None:
    with running(tiny("llama"), max_sessions=1) as server, server.client() as client:
        holder = client.generate("a", max_tokens=250, ignore_eos=True)
        next(holder)
        with pytest.raises(DeadlineExceeded):
            client.complete("b", timeout=0.001)
        assert len(list(holder)) == 251
        assert client.list_sessions() == []


@pytest.mark.parametrize(
    ("options", "field"),
    [
        ({"token_ids": [-1]}, "token_ids"),
        ({"token_ids": [1 << 32]}, "token_ids"),
        ({"token_ids": ["a"]}, "token_ids"),
        ({"prompt": "\ud800"}, "text"),
        ({"prompt": b"\xff"}, "text"),
        ({"prompt": "a", "density": "half"}, "pruning.density"),
        ({"prompt": "a", "top_logprobs": -1}, "top_logprobs"),
        ({"prompt": "a", "top_k": -1}, "sampling.top_k"),
        ({"prompt": "a", "seed": -1}, "sampling.seed"),
        ({"prompt": "a", "logit_bias": {-1: 0.0}}, "sampling.logit_bias"),
        ({"prompt": "a", "max_tokens": -1}, "stopping.max_tokens"),
        ({"prompt": "a", "stop": [3]}, "stopping.stop"),  # type: ignore[list-item]
        ({"messages": [("user", 3)]}, "messages[0].content"),
        ({"messages": "hi"}, "messages"),
        ({"messages": [("user", "hi"), "hi"]}, "messages[1]"),
        ({"messages": [{"role": "user", "content": "hi", "name": "me"}]}, "messages[0]"),
        ({"prompt": "a", "policy": "best"}, "pruning.policy"),
        ({"prompt": "a", "sharing": 1}, "pruning.sharing"),
        ({"prompt": "a", "timeout": 0}, "timeout"),
        ({"prompt": "a", "timeout": "10"}, "timeout"),
    ],
)
def test_what_cannot_be_sent_is_refused_by_name_too(
    tiny_server: Running, options: dict[str, object], field: str
) -> None:
    with tiny_server.client() as client, pytest.raises(InvalidArgument) as caught:
        client.complete(**options)  # type: ignore[arg-type]
    assert list(caught.value.violations) == [field]
    assert str(caught.value).startswith(f"INVALID_ARGUMENT: {field}: got ")


def test_no_server_is_unavailable() -> None:
    with GriffinClient("127.0.0.1:1") as client:
        with pytest.raises(Unavailable) as caught:
            client.complete("a", timeout=10)
        assert caught.value.code is grpc.StatusCode.UNAVAILABLE
        assert isinstance(caught.value, GriffinClientError)


def test_a_full_queue_says_when_to_come_back(tiny: Callable[[str], Model]) -> None:
    settings = {"max_sessions": 1, "max_queue": 0}
    with running(tiny("llama"), **settings) as server, server.client() as client:
        holder = client.generate("a", max_tokens=250, ignore_eos=True)
        next(holder)
        with pytest.raises(ResourceExhausted) as caught:
            client.complete("b")
        assert caught.value.retry_after_s is not None and caught.value.retry_after_s > 0
        assert len(list(holder)) == 251


async def test_a_call_is_tried_again_until_there_is_room(
    tiny: Callable[[str], Model], monkeypatch: pytest.MonkeyPatch
) -> None:
    waits: list[float | None] = []
    wait_s = Retries.wait_s

    def noted(retries: Retries, error: GriffinClientError) -> float | None:
        waits.append(wait_s(retries, error))
        return waits[-1]

    monkeypatch.setattr(Retries, "wait_s", noted)
    settings = {"max_sessions": 1, "max_queue": 0}
    with running(tiny("llama"), **settings) as server:
        async with AsyncGriffinClient(server.target, max_retries=20, timeout=60) as client:
            holder = client.generate("a", max_tokens=250, ignore_eos=True)
            await anext(holder)
            waiting = asyncio.create_task(client.complete("b", **THREE))
            assert len([event async for event in holder]) == 251
            assert (await waiting).finished.usage.generated_tokens == 3
    assert waits and None not in waits


def test_what_never_fits_has_no_retry_hint(tiny: Callable[[str], Model]) -> None:
    with running(tiny("llama"), session_memory_gib=1e-6) as server, server.client() as client:
        with pytest.raises(ResourceExhausted, match="memory") as caught:
            client.complete("a")
        assert caught.value.retry_after_s is None


def test_a_channel_given_is_used_and_not_closed(tiny_server: Running) -> None:
    with grpc.insecure_channel(tiny_server.target) as channel:
        for _ in range(2):
            with GriffinClient(channel=channel) as client:
                assert client.model_info().family == "llama"
