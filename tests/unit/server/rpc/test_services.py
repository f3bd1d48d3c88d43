"""The services beside generation itself: sessions, model info, health, reflection, request ids."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from griffin.v1 import generation_pb2 as pb
from griffin.v1 import generation_pb2_grpc
from griffin_client import (
    AsyncGriffinClient,
    Cancelled,
    FailedPrecondition,
    Finished,
    GriffinClient,
    InvalidArgument,
    NotFound,
    SamplingDefaults,
    Sharing,
    Tokens,
    Unavailable,
)
from griffin_core.engine import loop
from griffin_core.errors import BadModelFile, EngineFault
from griffin_core.model.load import Model
from griffin_core.slim.costs import ASSUMED_COSTS
from griffin_server.app import App
from griffin_server.listener import GENERATION, PREFILL
from griffin_server.rpc.messages.sessions import PageTokens
from griffin_server.settings import Settings
from tests.servers import Running, running

SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING
LONG = {"max_tokens": 200, "ignore_eos": True}


@pytest.fixture
def client(tiny_server: Running) -> Iterator[GriffinClient]:
    with tiny_server.client() as connected:
        yield connected


@pytest.fixture
def channel(tiny_server: Running) -> Iterator[grpc.Channel]:
    with grpc.insecure_channel(tiny_server.target) as connected:
        yield connected


@pytest.mark.parametrize("sharing", ["private", "shared"])
def test_a_completion_says_what_its_tokens_ran_on(client: GriffinClient, sharing: Sharing) -> None:
    """The first token comes of the prompt, which runs dense."""
    six = {"max_tokens": 6, "ignore_eos": True}
    dense = client.complete(token_ids=range(20), density=1.0, sharing=sharing, **six)
    assert (dense.finished.pruning.mean_density, dense.finished.pruning.dense_tokens) == (1.0, 6)
    half = client.complete(token_ids=range(20), density=0.5, sharing=sharing, **six)
    assert half.finished.pruning.mean_density == pytest.approx((1 + 5 * 0.5) / 6)
    assert half.finished.pruning.dense_tokens == 1


def test_auto_says_how_much_of_a_completion_ran_dense(client: GriffinClient) -> None:
    made = client.complete(token_ids=range(20), density=0.5, sharing="auto", **LONG)
    pruning = made.finished.pruning
    assert 1 <= pruning.dense_tokens <= 200
    slim = 200 - pruning.dense_tokens
    assert pruning.mean_density == pytest.approx((pruning.dense_tokens + 0.5 * slim) / 200)


def test_a_call_by_itself_waits_for_no_other(
    client: GriffinClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loop, "GATHER_S", 60.0)
    for _ in range(20):
        client.complete("a", max_tokens=1, timeout=20)


def test_no_call_stays_announced(
    tiny_server: Running, client: GriffinClient, tiny: Callable[[str], Model]
) -> None:
    """Neither one that is answered nor one that is refused."""
    client.complete("a", max_tokens=1)
    with pytest.raises(InvalidArgument):
        client.complete("a", top_p=2.0)
    with pytest.raises(InvalidArgument):
        client.score("", "b")
    assert tiny_server.app.engine.arrivals.expected == 0


def test_model_info_is_the_models(client: GriffinClient, tiny: Callable[[str], Model]) -> None:
    model = tiny("llama")
    info = client.model_info()
    assert info.fingerprint == model.fingerprint
    assert (info.family, info.layers, info.width, info.ff_width) == ("llama", 3, 48, 88)
    assert (info.heads, info.kv_heads, info.head_dim) == (4, 2, 16)
    assert (info.vocabulary, info.context_length) == (260, 256)
    assert (info.dtype, info.device, info.role) == ("float32", "cpu", "all")
    assert info.has_chat_template and (info.default_density, info.default_policy) == (1.0, "topk")
    assert info.default_sampling == SamplingDefaults()


@pytest.mark.parametrize("on", [False, True])
def test_model_info_says_whether_sessions_are_batch_invariant(
    on: bool, tiny: Callable[[str], Model]
) -> None:
    with (
        running(tiny("llama"), batch_invariant=on) as server,
        grpc.insecure_channel(server.target) as channel,
    ):
        stub = generation_pb2_grpc.GenerationServiceStub(channel)
        assert stub.GetModelInfo(pb.GetModelInfoRequest()).batch_invariant is on


@pytest.fixture
def opinionated(tiny: Callable[[str], Model]) -> Model:
    """A model whose generation_config.json has sampling in it."""
    wanted = {"temperature": 1.5, "top_k": 40, "repetition_penalty": 1.25}
    return replace(tiny("llama"), sampling_defaults=wanted)


def test_a_request_that_sets_no_sampling_is_greedy(opinionated: Model) -> None:
    with running(opinionated) as server, server.client() as client:
        said = [client.complete("a", max_tokens=20).token_ids for _ in range(3)]
        greedy = client.complete("a", max_tokens=20, temperature=0)
    assert said == [greedy.token_ids] * 3


def test_the_models_own_sampling_is_the_default_if_the_server_is_told_so(
    opinionated: Model,
) -> None:
    with running(opinionated, sampling_defaults="model") as server, server.client() as client:
        assert client.model_info().default_sampling == SamplingDefaults(
            temperature=1.5, top_k=40, repetition_penalty=1.25
        )

        def said(**sampling: float) -> tuple[int, ...]:
            return client.complete("a", max_tokens=20, ignore_eos=True, **sampling).token_ids

        whole = {"temperature": 1.5, "top_k": 40, "repetition_penalty": 1.25, "seed": 3}
        assert said(seed=3) == said(**whole)
        # What a request sets wins, field by field: also where that is a plain default.
        greedy = {"temperature": 0, "repetition_penalty": 1.25}
        assert said(temperature=0) == said(**greedy)
        plain = {"temperature": 0, "top_k": 0, "repetition_penalty": 1}
        assert said(**plain) != said(**greedy)


def test_sampling_defaults_that_no_request_could_have_stop_the_start(
    tiny: Callable[[str], Model],
) -> None:
    model = replace(tiny("llama"), sampling_defaults={"temperature": -1.0})
    words = r"generation_config.json of 'llama'.*temperature: got -1.0; allowed: >= 0"
    with pytest.raises(BadModelFile, match=words):
        App(Settings(port=0, sampling_defaults="model"), model)


@pytest.fixture
def stub(channel: grpc.Channel) -> generation_pb2_grpc.GenerationServiceStub:
    return generation_pb2_grpc.GenerationServiceStub(channel)


@pytest.fixture
def kept(client: GriffinClient) -> Iterator[list[str]]:
    """The ids of seven kept sessions, oldest first."""
    two = {"max_tokens": 2, "ignore_eos": True}
    made = [client.complete("one", **two, keep_session=True) for _ in range(7)]
    ids = [each.started.session_id for each in made]
    yield ids
    for session_id in ids:
        with contextlib.suppress(NotFound):
            client.close_session(session_id)


def pages_of(
    stub: generation_pb2_grpc.GenerationServiceStub, size: int
) -> list[pb.ListSessionsResponse]:
    """All pages of so many sessions."""
    pages = [stub.ListSessions(pb.ListSessionsRequest(page_size=size))]
    while token := pages[-1].next_page_token:
        pages.append(stub.ListSessions(pb.ListSessionsRequest(page_size=size, page_token=token)))
    return pages


@pytest.mark.parametrize(("size", "sizes"), [(1, [1] * 7), (3, [3, 3, 1]), (7, [7]), (1000, [7])])
def test_sessions_are_listed_in_pages_oldest_first(
    size: int,
    sizes: list[int],
    kept: list[str],
    stub: generation_pb2_grpc.GenerationServiceStub,
) -> None:
    pages = pages_of(stub, size)
    assert [len(page.sessions) for page in pages] == sizes
    assert [session.session_id for page in pages for session in page.sessions] == kept
    assert {page.total_size for page in pages} == {7}
    (whole,) = [stub.ListSessions(pb.ListSessionsRequest())]
    assert [session.session_id for session in whole.sessions] == kept
    assert whole.next_page_token == ""


def test_pages_go_on_whatever_has_ended_or_opened_meanwhile(
    kept: list[str], client: GriffinClient, stub: generation_pb2_grpc.GenerationServiceStub
) -> None:
    first = stub.ListSessions(pb.ListSessionsRequest(page_size=3))
    for session_id in (*kept[:4], kept[5]):
        client.close_session(session_id)
    two = {"max_tokens": 2, "ignore_eos": True}
    later = client.complete("two", **two, keep_session=True).started.session_id
    kept.append(later)
    rest = stub.ListSessions(pb.ListSessionsRequest(page_size=9, page_token=first.next_page_token))
    assert [session.session_id for session in rest.sessions] == [kept[4], kept[6], later]
    assert (rest.next_page_token, rest.total_size) == ("", 3)


def test_a_page_behind_the_last_session_is_empty(
    kept: list[str], client: GriffinClient, stub: generation_pb2_grpc.GenerationServiceStub
) -> None:
    token = stub.ListSessions(pb.ListSessionsRequest(page_size=6)).next_page_token
    client.close_session(kept[6])
    last = stub.ListSessions(pb.ListSessionsRequest(page_token=token))
    assert (list(last.sessions), last.next_page_token, last.total_size) == ([], "", 6)


@pytest.mark.parametrize("size", [0, 1001, 2**32 - 1])
def test_a_page_of_no_or_too_many_sessions_is_refused(
    size: int, stub: generation_pb2_grpc.GenerationServiceStub
) -> None:
    with pytest.raises(grpc.RpcError) as refused:
        stub.ListSessions(pb.ListSessionsRequest(page_size=size))
    assert refused.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert f"page_size: got {size}; allowed: [1, 1000]" in refused.value.details()


@pytest.mark.parametrize("change", ["", "other", "short", "long", "spaced", "letters"])
def test_a_page_token_that_this_server_has_not_made_is_refused(
    change: str, kept: list[str], stub: generation_pb2_grpc.GenerationServiceStub
) -> None:
    token = stub.ListSessions(pb.ListSessionsRequest(page_size=3)).next_page_token
    given = {
        "": "1",
        "other": PageTokens().write(3),
        "short": token[:-4],
        "long": token + token,
        "spaced": f" {token}",
        "letters": "\N{SNOWMAN}" * 500,
    }[change]
    with pytest.raises(grpc.RpcError) as refused:
        stub.ListSessions(pb.ListSessionsRequest(page_token=given))
    assert refused.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert "page_token: got" in refused.value.details()


def test_a_kept_session_is_listed_continued_and_closed(client: GriffinClient) -> None:
    two = {"max_tokens": 2, "ignore_eos": True}
    first = client.complete("one", **two, density=0.5, keep_session=True)
    session_id = first.started.session_id
    assert first.finished.session_kept

    (session,) = client.list_sessions()
    alone = client.get_session(session_id)
    assert replace(alone, age_s=session.age_s, idle_s=session.idle_s) == session
    assert (session.state, session.context_tokens, session.generated_tokens) == ("idle", 5, 2)
    assert session.pruning.density == 0.5
    assert session.pruning.kv_cache_bytes > 0

    second = client.complete(" two", **two, session_id=session_id, keep_session=True)
    assert second.started.session_id == session_id
    assert second.finished.pruning.density == 0.5  # inherited
    assert second.finished.usage.context_tokens == 3 + 2 + 4 + 2
    client.close_session(session_id)
    assert client.list_sessions() == []
    with pytest.raises(NotFound):
        client.close_session(session_id)


def test_closing_a_running_session_ends_its_stream(client: GriffinClient) -> None:
    events = client.generate("a", **LONG)
    session_id = next(events).session_id  # type: ignore[union-attr]
    client.close_session(session_id)
    with pytest.raises(Cancelled, match="was closed"):
        list(events)


def test_a_session_takes_one_turn_at_a_time(client: GriffinClient) -> None:
    kept = client.complete("a", max_tokens=1, keep_session=True)
    session_id = kept.started.session_id
    events = client.generate("b", **LONG, session_id=session_id, keep_session=True)
    next(events)
    with pytest.raises(FailedPrecondition, match="still in an earlier turn"):
        client.complete("c", session_id=session_id)
    assert len([e for e in events if isinstance(e, Tokens)]) == 200  # unharmed
    client.close_session(session_id)


def test_the_request_id_is_the_requests_or_the_metadatas_or_new(channel: grpc.Channel) -> None:
    stub = generation_pb2_grpc.GenerationServiceStub(channel)

    def returned(request_id: str, metadata: tuple[tuple[str, str], ...] = ()) -> str:
        request = pb.GenerateRequest(text="a", stopping=pb.Stopping(max_tokens=1))
        request.request_id = request_id
        call = stub.Generate(request, metadata=metadata, timeout=30)
        started = next(iter(call)).started
        assert dict(call.initial_metadata())["x-request-id"] == started.request_id
        return started.request_id

    given = (("x-request-id", "from-metadata"),)
    assert returned("from-request", given) == "from-request"
    assert returned("", given) == "from-metadata"
    assert len(returned("")) == 32
    assert returned("") != returned("")


def test_a_failed_call_carries_its_request_id(client: GriffinClient) -> None:
    with pytest.raises(NotFound) as caught:
        client.complete("a", session_id="nobody", request_id="find-me")
    assert caught.value.request_id == "find-me"


def test_the_prefill_server_logs_the_same_request_id(
    tiny: Callable[[str], Model], capfd: pytest.CaptureFixture[str]
) -> None:
    logging.getLogger("griffin").setLevel(logging.INFO)
    with (
        running(tiny("llama"), role="prefill") as prefill,
        running(tiny("llama"), role="decode", prefill_target=prefill.target) as decode,
        decode.client() as client,
    ):
        client.complete("a", max_tokens=1, request_id="both-sides")
    lines = [line for line in capfd.readouterr().out.splitlines() if "both-sides" in line]
    assert any("PrefillService/Prefill" in line for line in lines)
    assert any("GenerationService/Generate" in line for line in lines)


@pytest.mark.parametrize("role", ["all", "prefill", "decode"])
def test_each_role_serves_its_services_and_says_so(role: str, tiny: Callable[[str], Model]) -> None:
    target = {"prefill_target": "localhost:1"} if role == "decode" else {}
    expected = {"all": {GENERATION}, "prefill": {PREFILL}, "decode": {GENERATION}}[role]
    with (
        running(tiny("llama"), role=role, **target) as server,
        grpc.insecure_channel(server.target) as channel,
    ):
        reflection = reflection_pb2_grpc.ServerReflectionStub(channel)
        request = reflection_pb2.ServerReflectionRequest(list_services="")
        (answer,) = reflection.ServerReflectionInfo(iter([request]))
        listed = {item.name for item in answer.list_services_response.service}
        assert listed == expected | {
            "grpc.health.v1.Health",
            "grpc.reflection.v1.ServerReflection",
            "grpc.reflection.v1alpha.ServerReflection",
        }
        health = health_pb2_grpc.HealthStub(channel)
        for service in ("", *expected):
            request = health_pb2.HealthCheckRequest(service=service)
            assert health.Check(request).status == SERVING
        for service in {GENERATION, PREFILL} - expected:
            with pytest.raises(grpc.RpcError) as caught:
                health.Check(health_pb2.HealthCheckRequest(service=service))
            assert caught.value.code() is grpc.StatusCode.NOT_FOUND


def test_reflection_gives_the_public_descriptor(channel: grpc.Channel) -> None:
    reflection = reflection_pb2_grpc.ServerReflectionStub(channel)
    request = reflection_pb2.ServerReflectionRequest(file_containing_symbol=GENERATION)
    (answer,) = reflection.ServerReflectionInfo(iter([request]))
    assert pb.DESCRIPTOR.serialized_pb in answer.file_descriptor_response.file_descriptor_proto


def test_watchers_of_health_see_the_shutdown(tiny: Callable[[str], Model]) -> None:
    with running(tiny("llama")) as server:
        channel = grpc.insecure_channel(server.target)
        watch = health_pb2_grpc.HealthStub(channel).Watch(
            health_pb2.HealthCheckRequest(service=GENERATION), timeout=60
        )
        assert next(watch).status == SERVING
    assert next(watch).status == NOT_SERVING
    channel.close()


async def test_a_server_that_stops_finishes_what_runs_and_refuses_the_rest(
    tiny: Callable[[str], Model],
) -> None:
    app = App(Settings(port=0, density=1.0), tiny("llama"))
    await app.start()
    async with AsyncGriffinClient(str(app.listener.address), max_retries=0) as client:
        stream = client.generate("a", max_tokens=250, ignore_eos=True)
        await anext(stream)
        stopping = asyncio.create_task(app.stop())
        while app.listener.drain.serving:  # noqa: ASYNC110  # nothing announces it
            await asyncio.sleep(0)
        with pytest.raises(Unavailable) as refused:
            await client.complete("b")
        assert refused.value.reason == "SHUTTING_DOWN"
        events = [event async for event in stream]
        assert isinstance(events[-1], Finished)
        assert events[-1].usage.generated_tokens == 250
    await stopping


async def test_until_the_engine_is_ready_calls_are_refused(
    tiny: Callable[[str], Model], monkeypatch: pytest.MonkeyPatch
) -> None:
    app, prepared = App(Settings(port=0), tiny("llama")), threading.Event()
    monkeypatch.setattr(
        "griffin_core.engine.step_setup.measure_costs",
        lambda *_: ASSUMED_COSTS if prepared.wait(60) else 1 // 0,
    )
    starting = asyncio.create_task(app.start())
    await asyncio.sleep(0)  # it listens before it waits for anything
    assert app.listener.address.port
    async with grpc.aio.insecure_channel(str(app.listener.address)) as channel:
        health = health_pb2_grpc.HealthStub(channel)
        client = AsyncGriffinClient(channel=channel, max_retries=0)
        request = health_pb2.HealthCheckRequest()
        assert (await health.Check(request, wait_for_ready=True)).status == NOT_SERVING
        with pytest.raises(Unavailable, match="starting"):
            await client.model_info()
        prepared.set()
        await starting
        assert (await health.Check(request)).status == SERVING
        assert (await client.model_info()).family == "llama"
    await app.stop()


async def test_an_engine_that_does_not_come_up_ends_the_start(
    tiny: Callable[[str], Model], monkeypatch: pytest.MonkeyPatch
) -> None:
    app = App(Settings(port=0), tiny("llama"))
    monkeypatch.setattr("griffin_core.engine.step_setup.measure_costs", lambda *_: 1 // 0)
    with pytest.raises(EngineFault, match="did not start"):
        await app.start()
    await app.stop()


async def test_threads_that_cannot_be_had_are_a_fault_and_no_wait(
    tiny: Callable[[str], Model], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(threads: int) -> None:
        raise ValueError("Overflow")

    monkeypatch.setattr("griffin_core.engine.model_threads.torch.set_num_threads", fail)
    app = App(Settings(port=0, threads=1), tiny("llama"))
    with pytest.raises(EngineFault, match="did not start: Overflow"):
        await app.start()
    await app.stop()
