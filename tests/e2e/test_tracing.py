"""One trace goes from the client through decode to prefill, and says where the time went."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor

from griffin_client import (
    AsyncGriffinClient,
    DeadlineExceeded,
    GriffinClient,
    InvalidArgument,
    Started,
    Unavailable,
)
from griffin_core.model.load import Model
from griffin_server.telemetry.tracing import Tracing
from tests.otlp import Receiver, Span
from tests.servers import Process, running

GENERATE, PREFILL = "griffin.v1.GenerationService/Generate", "griffin.v1.PrefillService/Prefill"
pytestmark = pytest.mark.e2e

SIX = {"max_tokens": 6, "ignore_eos": True}
ENDLESS = {"max_tokens": 5000, "ignore_eos": True}
LATE_S = 0.02
"""Threads and processes that share CPUs notice an end when they get their turn."""


@pytest.fixture(autouse=True)
def nothing_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """By the environment the tests run in."""
    for name in [name for name in os.environ if name.startswith("OTEL_")]:
        monkeypatch.delenv(name)


@pytest.fixture
def receiver(monkeypatch: pytest.MonkeyPatch) -> Iterator[Receiver]:
    """Where servers that start from now on send their spans, processes included."""
    with Receiver() as receiving:
        monkeypatch.setenv("OTEL_TRACES_EXPORTER", "otlp")
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", receiving.url)
        yield receiving


@pytest.fixture
def provider(receiver: Receiver) -> Iterator[TracerProvider]:
    """The application's own."""
    made = TracerProvider(
        resource=Resource({"service.name": "application"}), shutdown_on_exit=False
    )
    made.add_span_processor(SimpleSpanProcessor(OTLPSpanExporter()))
    yield made
    made.shutdown()


def tree(spans: list[Span], parent: bytes = b"", depth: int = 0) -> list[str]:
    """Names, indented by depth, in order of time; of which process, where that changes."""
    lines = []
    for span in sorted((s for s in spans if s.parent == parent), key=lambda span: span.begin):
        lines += [f"{'  ' * depth}{span.service}: {span.name}", *tree(spans, span.id, depth + 1)]
    return lines


def test_one_trace_from_the_client_through_decode_to_prefill_and_back(
    receiver: Receiver, provider: TracerProvider, tiny_directory: Callable[[str], Path]
) -> None:
    options = ("--dtype", "float32", "--shutdown-grace-s", "5")
    model = ("--model", str(tiny_directory("llama")), *options)
    with (
        Process(*model, "--role", "prefill") as prefill,
        Process(
            *model, "--role", "decode", "--prefill-target", prefill.target(), OTEL_SERVICE_NAME="d"
        ) as decode,
        GriffinClient(decode.target(), max_retries=0) as client,
    ):
        with provider.get_tracer("test").start_as_current_span("ask"):
            done = client.complete(
                token_ids=range(100),
                density=0.5,
                sharing="shared",  # whose view is always built
                **SIX,
                request_id="traced",
            )
        for process in (decode, prefill):
            process.terminate()
            assert process.wait() == 0  # and what was not sent yet was sent

    spans = receiver.spans
    assert tree(spans) == [
        "application: ask",
        f"  d: {GENERATE}",
        "    d: queue",
        "    d: prefill",
        "      d: handoff",
        f"        griffin-prefill: {PREFILL}",
        "          griffin-prefill: queue",
        "          griffin-prefill: prefill",
        "            griffin-prefill: selection",
        "    d: decode",
        "      d: slim build",
    ]
    assert len({span.trace for span in spans}) == 1
    assert not any(span.failed for span in spans)
    (generate,), (prefilled,), (handoff,) = map(receiver.named, (GENERATE, PREFILL, "handoff"))
    assert [generate.kind, handoff.kind, prefilled.kind] == ["server", "client", "server"]
    assert generate.attributes == {
        "rpc.system.name": "grpc",
        "rpc.method": GENERATE,
        "rpc.response.status_code": "OK",
        "griffin.request_id": "traced",
        "griffin.density": 0.5,
        "griffin.prompt_tokens": 100,
        "griffin.generated_tokens": 6,
        "griffin.finish_reason": "max_tokens",
    }
    assert prefilled.attributes["griffin.request_id"] == "traced"
    assert prefilled.attributes["griffin.prompt_tokens"] == 100

    by_id = {span.id: span for span in spans}
    for span in spans:
        assert span.begin <= span.end
        if parent := by_id.get(span.parent):
            assert parent.begin <= span.begin, span.name
            # Decode has read all of a handoff when Prefill's call is not over yet.
            assert span is prefilled or span.end <= parent.end + LATE_S, span.name
    queue, waiting = receiver.named("queue")
    reading, running_it = receiver.named("prefill")
    (decoding,), (build,) = receiver.named("decode"), receiver.named("slim build")
    assert queue.end == reading.begin and reading.end == decoding.begin
    assert waiting.end == running_it.begin
    timings = done.finished.timings
    for span, seconds in (
        (queue, timings.queue_s),
        (reading, timings.prefill_s),
        (build, timings.slim_build_s),
        (receiver.named("selection")[0], timings.selection_s),
    ):
        assert span.end - span.begin == pytest.approx(seconds, abs=1e-5), span.name


async def test_the_asynchronous_client_carries_the_trace_on_too(
    receiver: Receiver, provider: TracerProvider, tiny: Callable[[str], Model]
) -> None:
    with running(tiny("llama")) as server:
        async with AsyncGriffinClient(server.target, max_retries=0) as client:
            with provider.get_tracer("test").start_as_current_span("ask"):
                await client.complete("abc", **SIX)
                await client.score("abc", "d")
            await client.model_info()  # of no trace but its own
    lines = tree(receiver.spans)
    assert lines[:6] == [
        "application: ask",
        f"  griffin-all: {GENERATE}",
        "    griffin-all: queue",
        "    griffin-all: prefill",
        "      griffin-all: selection",
        "    griffin-all: decode",
    ]
    assert "  griffin-all: griffin.v1.GenerationService/Score" in lines
    assert lines[-1] == "griffin-all: griffin.v1.GenerationService/GetModelInfo"


async def test_an_analysis_is_of_its_callers_trace_too(
    receiver: Receiver, provider: TracerProvider, tiny: Callable[[str], Model]
) -> None:
    with running(tiny("llama")) as server, server.client() as client:
        async with AsyncGriffinClient(server.target, max_retries=0) as other:
            with provider.get_tracer("test").start_as_current_span("ask"):
                client.analyze_prompt("abc")
                await other.analyze_prompt("abc")
    call = [
        "  griffin-all: griffin.v1.GenerationService/AnalyzePrompt",
        "    griffin-all: queue",
        "    griffin-all: prefill",
        "      griffin-all: selection",
    ]
    assert tree(receiver.spans) == ["application: ask", *call, *call]


def test_a_call_that_ends_early_shows_in_which_phase_and_why(
    receiver: Receiver, tiny: Callable[[str], Model]
) -> None:
    with running(tiny("llama-long"), max_sessions=1) as server, server.client() as client:
        holder = client.generate("a", **ENDLESS)
        assert isinstance(next(holder), Started)
        with pytest.raises(DeadlineExceeded):
            client.complete("b", timeout=0.3)
        with pytest.raises(InvalidArgument):
            client.complete("c", density=7.0)
        holder.close()  # type: ignore[attr-defined]
    held, late, bad = receiver.named(GENERATE)

    def ended(call: Span) -> tuple[str, bool, str]:
        phases = sorted((s for s in receiver.spans if s.parent == call.id), key=lambda s: s.begin)
        code = call.attributes["rpc.response.status_code"]
        return code, call.failed, phases[-1].name if phases else ""

    assert ended(held) == ("CANCELLED", False, "decode")
    assert ended(late) == ("DEADLINE_EXCEEDED", True, "queue")
    assert ended(bad) == ("INVALID_ARGUMENT", False, "")


def test_a_handoff_that_fails_shows_each_server_that_was_tried(
    receiver: Receiver, tiny: Callable[[str], Model]
) -> None:
    targets = "127.0.0.1:1,127.0.0.1:2"
    with (
        running(tiny("llama"), role="decode", prefill_target=targets) as server,
        server.client() as client,
        pytest.raises(Unavailable),
    ):
        client.complete("abc", **SIX)
    handoffs = receiver.named("handoff")
    tried = [span.attributes["griffin.prefill_target"] for span in handoffs]
    assert tried == targets.split(",") and all(span.failed for span in handoffs)
    (generate,) = receiver.named(GENERATE)
    assert generate.failed and generate.attributes["error.type"] == "UNAVAILABLE"


def test_a_receiver_that_does_not_answer_holds_a_stop_up_only_briefly(
    tiny: Callable[[str], Model], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("griffin_server.telemetry.tracing.FLUSH_S", 0.2)
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://127.0.0.1:1")
    with running(tiny("llama")) as server, server.client() as client:
        client.complete("abc", **SIX)
        clock = time.monotonic()
    assert time.monotonic() - clock < 5


OFF = """
import asyncio, sys
from griffin_client import AsyncGriffinClient
from griffin_server.app import App, load
from griffin_server.settings import Settings

async def main():
    settings = Settings(model=sys.argv[1], port=0)
    app = App(settings, load(settings, print))
    await app.start()
    async with AsyncGriffinClient(str(app.listener.address), max_retries=0) as client:
        await client.complete("abc")
    await app.stop()

asyncio.run(main())
loaded = [m for m in sys.modules if m.startswith(("opentelemetry.sdk", "opentelemetry.exporter"))]
assert not loaded, loaded
"""


def test_when_it_is_off_the_sdk_is_not_even_imported(
    tiny_directory: Callable[[str], Path],
) -> None:
    command = [sys.executable, "-c", OFF, str(tiny_directory("llama"))]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("environment", "warned"),
    [
        ({}, False),
        ({"EXPORTER_OTLP_ENDPOINT": "http://localhost:1", "TRACES_EXPORTER": "none"}, False),
        ({"EXPORTER_OTLP_ENDPOINT": "http://localhost:1", "SDK_DISABLED": "True"}, False),
        ({"TRACES_EXPORTER": "otlp", "EXPORTER_OTLP_PROTOCOL": "http/protobuf"}, True),
        ({"TRACES_EXPORTER": "zipkin"}, True),
        ({"TRACES_EXPORTER": "otlp", "EXPORTER_OTLP_TIMEOUT": "10s"}, True),
        ({"TRACES_EXPORTER": "otlp", "EXPORTER_OTLP_COMPRESSION": "zip"}, True),
        ({"TRACES_EXPORTER": "otlp", "BSP_MAX_QUEUE_SIZE": "1"}, True),
    ],
)
def test_it_is_off_unless_the_environment_asks_for_what_is_known(
    environment: dict[str, str],
    warned: bool,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(f"OTEL_{name}", value)
    assert not Tracing("all").sending
    assert ("no traces" in capsys.readouterr().out) == warned
