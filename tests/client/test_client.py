"""The SDK: what it exports, what it needs, and what its calls raise."""

from __future__ import annotations

import inspect
import subprocess
import sys
from collections.abc import Callable
from dataclasses import fields
from typing import Any

import grpc
import pytest

import griffin_client
from griffin.v1 import generation_pb2, generation_pb2_grpc
from griffin_client import (
    AsyncGriffinClient,
    DeadlineExceeded,
    Finished,
    GriffinClient,
    GriffinClientError,
    InvalidArgument,
    Message,
    ModelInfo,
    NotFound,
    ResourceExhausted,
    Sampling,
    Started,
    Stopping,
    Tokens,
    Unavailable,
)
from griffin_core.model.load import Model
from tests.servers import Running, running

THREE = Stopping(max_tokens=3, ignore_eos=True)


def test_exactly_these_names_are_exported() -> None:
    """A name that leaves this list breaks somebody's import: say so in the CHANGELOG."""
    assert sorted(griffin_client.__all__) == [
        "Aborted",
        "Analysis",
        "AsyncGriffinClient",
        "Cancelled",
        "Completion",
        "DeadlineExceeded",
        "Event",
        "FailedPrecondition",
        "Finished",
        "GriffinClient",
        "GriffinClientError",
        "InvalidArgument",
        "LayerAnalysis",
        "Message",
        "ModelInfo",
        "NotFound",
        "PruningFigures",
        "ResourceExhausted",
        "Sampling",
        "Score",
        "ScoreMode",
        "ServerFault",
        "Session",
        "Sharing",
        "Started",
        "Stopping",
        "Timings",
        "TokenLogprob",
        "TokenScore",
        "Tokens",
        "TopLogprob",
        "Unavailable",
        "Usage",
    ]
    assert all(hasattr(griffin_client, name) for name in griffin_client.__all__)


METHODS = {
    "Generate": ["generate", "complete"],
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
    "Generate": generation_pb2.GenerateRequest,
    "Score": generation_pb2.ScoreRequest,
    "AnalyzePrompt": generation_pb2.AnalyzePromptRequest,
}

GIVEN_AS = {
    "text": "prompt",
    "context_token_ids": "context",
    "continuation_token_ids": "continuation",
    "pruning": "density",
}


@pytest.mark.parametrize("rpc", REQUESTS)
def test_every_field_of_a_request_can_be_given(rpc: str) -> None:
    methods = [getattr(GriffinClient, name) for name in METHODS[rpc]]
    parameters = {name for method in methods for name in inspect.signature(method).parameters}
    names = [field.name for field in REQUESTS[rpc].DESCRIPTOR.fields]
    assert {GIVEN_AS.get(name, name) for name in names} <= parameters


def test_the_sdks_dataclasses_have_the_fields_of_their_messages() -> None:
    for kind in (Sampling, Stopping, ModelInfo):
        message = {"ModelInfo": "GetModelInfoResponse"}.get(kind.__name__, kind.__name__)
        names = [field.name for field in getattr(generation_pb2, message).DESCRIPTOR.fields]
        assert {field.name for field in fields(kind)} == set(names)


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


def test_the_sdk_needs_grpcio_and_protobuf_alone() -> None:
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
    griffin_client.GriffinClient("localhost:1").complete("a", timeout_s=5)
except griffin_client.Unavailable:
    print("unavailable")
for module in ("google.rpc", "google.api"):
    assert module not in sys.modules, module
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False
    )
    assert (done.stdout.strip(), done.returncode) == ("unavailable", 0), done.stderr


def test_events_come_in_order(tiny_server: Running) -> None:
    with tiny_server.client() as client:
        started, *tokens, finished = client.generate("abc", stopping=THREE)
    assert isinstance(started, Started) and isinstance(finished, Finished)
    assert [len(each.ids) for each in tokens if isinstance(each, Tokens)] == [1, 1, 1]
    assert finished.reason == "max_tokens"
    assert finished.usage.prompt_tokens == started.prompt_tokens == 3
    timings = finished.timings
    assert 0 < timings.prefill_s <= timings.first_token_s
    assert finished.tokens_per_second == pytest.approx(2 / timings.decode_s)


def test_a_completion_is_its_events_put_together(tiny_server: Running) -> None:
    with tiny_server.client() as client:
        options = {"stopping": THREE, "density": 0.5, "top_logprobs": 2}
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
            client.complete(text, stopping=THREE),
            client.complete(token_ids=tiny("llama").tokenizer.encode(text), stopping=THREE),
            client.complete(messages=[("user", "hi")], stopping=THREE),
            client.complete(messages=[Message(role="user", content="hi")], stopping=THREE),
        ]
    assert len({completion.token_ids for completion in made}) == 1


async def test_the_async_client_gives_what_the_sync_one_gives(tiny_server: Running) -> None:
    options = {"stopping": THREE, "density": 0.5}
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
        holder = client.generate("a", stopping=Stopping(max_tokens=250, ignore_eos=True))
        next(holder)
        with pytest.raises(DeadlineExceeded):
            client.complete("b", timeout_s=0.001)
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
        ({"prompt": "a", "sampling": Sampling(top_k=-1)}, "sampling.top_k"),
        ({"prompt": "a", "sampling": Sampling(seed=-1)}, "sampling.seed"),
        ({"prompt": "a", "sampling": Sampling(logit_bias={-1: 0.0})}, "sampling.logit_bias"),
        ({"prompt": "a", "stopping": Stopping(max_tokens=-1)}, "stopping.max_tokens"),
        ({"prompt": "a", "stopping": Stopping(stop=[3])}, "stopping.stop"),  # type: ignore[list-item]
        ({"messages": [("user", 3)]}, "messages[0].content"),
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
            client.complete("a", timeout_s=10)
        assert caught.value.code is grpc.StatusCode.UNAVAILABLE
        assert isinstance(caught.value, GriffinClientError)


def test_a_full_queue_says_when_to_come_back(tiny: Callable[[str], Model]) -> None:
    settings = {"max_sessions": 1, "max_queue": 0}
    with running(tiny("llama"), **settings) as server, server.client() as client:
        holder = client.generate("a", stopping=Stopping(max_tokens=250, ignore_eos=True))
        next(holder)
        with pytest.raises(ResourceExhausted) as caught:
            client.complete("b")
        assert caught.value.retry_after_s is not None and caught.value.retry_after_s > 0
        assert len(list(holder)) == 251


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
