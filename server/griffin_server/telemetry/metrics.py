"""Every metric of a server: names, buckets, labels. ``/metrics`` shows them.

Times are of one process's monotonic clock, in seconds. No label names a session or a request, so
their number is bounded: by layers, status codes, methods.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from concurrent.futures import TimeoutError as NotInTime
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import grpc
from prometheus_client import CollectorRegistry, Counter, Histogram, Summary
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector

from griffin_core.errors import EngineStopped, GriffinError
from griffin_core.observer import Observer
from griffin_server.rpc.status import CODES, code_of, code_of_cancel

if TYPE_CHECKING:  # they bring torch, and a server answers before that is imported
    from griffin_core.decode.events import Finished, TokensMade
    from griffin_core.engine import Engine
    from griffin_core.experts.expert_set import ExpertSet
    from griffin_core.prefill import PrefillFinished
    from griffin_server.transfer.shape import HandoffShape

FINE = (*(round(1e-3 * 10 ** (step / 17), 6) for step in range(52)), 2.0, 5.0, 10.0)
"""Seconds, from 1 ms to 1 s by a ratio of 1.145: a gain of 1.25 shows."""

COARSE = tuple(round(1e-3 * 10 ** (step / 5), 6) for step in range(26))
"""Seconds, from 1 ms to 100 s by a ratio of 1.58."""

SIZES = tuple(float(1 << power) for power in range(11))

SCRAPE_S = 5.0
"""How long a scrape waits for a busy engine's word; without it, gauges are left out."""


MOST_REMEMBERED = 32
"""Numbers of experts whose last set is remembered."""

ORIGINS = {
    "READER_TOO_SLOW": "slow_reader",
    "SESSION_CLOSED": "closed",
    "DEADLINE_PASSED": "deadline",
}
"""Who ended a request, by the reason of its error; otherwise the server did."""

REASONS = sorted({reason for _, reason in CODES.values()})
"""What errors are told apart by."""


class Metrics(Observer):
    """The metrics of one server, in a registry of its own."""

    def __init__(self) -> None:
        self.registry = registry = CollectorRegistry()

        def histogram(name: str, words: str, buckets: tuple[float, ...] = COARSE) -> Histogram:
            return Histogram(name, words, buckets=buckets, registry=registry)

        def counter(name: str, words: str, labels: tuple[str, ...] = ()) -> Counter:
            return Counter(name, words, labels, registry=registry)

        def by_layer(name: str, words: str) -> Summary:
            return Summary(name, words, ("layer",), registry=registry)

        self.time_to_first_token = histogram(
            "griffin_time_to_first_token_seconds", "From a call's arrival to its first token."
        )
        self.inter_token_latency = histogram(
            "griffin_inter_token_latency_seconds",
            "Between tokens of a completion; tokens of one message share its time.",
            FINE,
        )
        self.e2e_request = histogram(
            "griffin_e2e_request_seconds", "From a call's arrival to the end of its completion."
        )
        self.request_queue = histogram(
            "griffin_request_queue_seconds", "From a call's arrival to its admission."
        )
        self.prefill = histogram(
            "griffin_prefill_seconds", "Running a prompt on this server's model."
        )
        self.expert_selection = histogram(
            "griffin_expert_selection_seconds",
            "Choosing a prompt's experts, a part of its prefill.",
            tuple(second / 100 for second in COARSE),
        )
        self.slim_build = histogram(
            "griffin_slim_build_seconds", "From the end of a prefill to its session's slim view."
        )
        self.handoff = histogram(
            "griffin_handoff_seconds", "Pulling a prefill from another server, its work included."
        )
        self.handoff_bytes = counter(
            "griffin_handoff_bytes_total", "Pulled and verified.", ("kind", "transport")
        )
        self.decode_step = histogram(
            "griffin_decode_step_seconds", "One step of all live sessions.", FINE
        )
        self.batch_size = histogram("griffin_batch_size", "Sessions of a step.", SIZES)
        self.ff_density = by_layer(
            "griffin_ff_density_ratio",
            "Share of a layer's FF neurons that a completion ran on, the mean over its tokens.",
        )
        self.norm_mass = by_layer(
            "griffin_expert_norm_mass_ratio",
            "Share of the prompt's activation norm that a completion's experts hold.",
        )
        self.jaccard = Histogram(
            "griffin_expert_jaccard_ratio",
            "Overlap of a prompt's experts with those of the prompt before it that kept as many; "
            "mean over layers.",
            buckets=tuple(part / 20 for part in range(1, 21)),
            registry=registry,
        )
        self.prompt_tokens = counter("griffin_prompt_tokens_total", "Of prompts that were read.")
        self.generated_tokens = counter("griffin_generated_tokens_total", "Sent to clients.")
        self.requests = counter(
            "griffin_requests_total",
            "Calls of Generate and Score that ended; without a finish reason unless completed.",
            ("code", "finish_reason"),
        )
        self.rejections = counter(
            "griffin_rejections_total",
            "Requests refused before their prompt was read.",
            ("reason",),
        )
        self.aborts = counter(
            "griffin_aborts_total",
            "Requests ended by somebody before they completed: their client, their deadline, a "
            "slow reader, a call that closed them, this server.",
            ("origin",),
        )
        method = ("grpc_type", "grpc_service", "grpc_method")
        self.grpc_started = counter("grpc_server_started_total", "Calls begun.", method)
        self.grpc_handled = counter(
            "grpc_server_handled_total", "Calls ended.", (*method, "grpc_code")
        )
        self.grpc_received = counter("grpc_server_msg_received_total", "Messages in.", method)
        self.grpc_sent = counter("grpc_server_msg_sent_total", "Messages out.", method)
        self.grpc_handling = Histogram(
            "grpc_server_handling_seconds", "Of calls.", method, buckets=COARSE, registry=registry
        )
        for reason in REASONS:  # so that a first one shows as an increase
            self.rejections.labels(reason)
        for origin in {*ORIGINS.values(), "client", "server"}:
            self.aborts.labels(origin)
        self._last_experts: dict[int, ExpertSet] = {}
        self._compares = ThreadPoolExecutor(1, thread_name_prefix="griffin-overlap")

    def watch(self, engine: Engine) -> None:
        """Adds what an engine holds at the moment of each scrape."""
        self.registry.register(_Held(engine))

    # -- what the engine tells -------------------------------------------------------------------

    def stepped(self, seconds: float, sessions: int) -> None:
        self.decode_step.observe(seconds)
        self.batch_size.observe(sessions)

    def prefilled(self, event: PrefillFinished) -> None:
        self.prefill.observe(event.compute_s)
        self.expert_selection.observe(event.selection_s)

    def chose(self, experts: ExpertSet) -> None:
        k = experts.indices.shape[1]
        if k == experts.ff_width:
            return
        if (before := self._last_experts.get(k)) is not None:
            if experts.indices.device.type == "cpu":
                self._compare(experts, before)
            else:  # the copy to the host waits for the device, and the engine must not
                self._compares.submit(self._compare, experts, before)
        elif len(self._last_experts) >= MOST_REMEMBERED:
            self._last_experts.pop(next(iter(self._last_experts)))
        self._last_experts[k] = experts

    def _compare(self, experts: ExpertSet, before: ExpertSet) -> None:
        overlaps = experts.jaccard(before)
        self.jaccard.observe(sum(overlaps) / len(overlaps))

    # -- what servicers tell ---------------------------------------------------------------------

    @contextmanager
    def request(
        self, arrived: float, context: grpc.aio.ServicerContext[Any, Any]
    ) -> Iterator[Request]:
        """Counts a call of Generate, Score or AnalyzePrompt, and how it ends.

        Args:
            arrived: on ``time.monotonic``.
        """
        request = Request(self, arrived)
        code, origin = "OK", ""
        try:
            yield request
        except GriffinError as error:
            status, reason = code_of(error)
            code = status.name
            origin = ORIGINS.get(reason, "server")
            if not request.started:
                self.rejections.labels(reason).inc()
                origin = ""
            raise
        except (asyncio.CancelledError, GeneratorExit):
            code = code_of_cancel(context).name
            origin = "client" if code == "CANCELLED" else "deadline"
            raise
        except Exception:
            code, origin = "INTERNAL", "server"
            raise
        finally:
            self.requests.labels(code, request.finish_reason).inc()
            if origin:
                self.aborts.labels(origin).inc()

    def grpc_call(self, kind: str, method: str) -> GrpcCall:
        """Counts a call of any method, "/package.Service/Method"."""
        _, service, name = method.split("/")
        return GrpcCall(self, (kind, service, name))

    def handed_over(self, shape: HandoffShape, transport: str, seconds: float) -> None:
        """A handoff came whole."""
        self.handoff.observe(seconds)
        for kind, size in shape.bytes_by_kind().items():
            self.handoff_bytes.labels(kind, transport).inc(size)


class Request:
    """A call of Generate, Score or AnalyzePrompt on its way."""

    def __init__(self, metrics: Metrics, arrived: float) -> None:
        self._metrics = metrics
        self._arrived = arrived
        self._last = 0.0
        self.started = False
        """Whether its prompt has been read."""
        self.finish_reason = ""

    def read(self, prompt_tokens: int) -> None:
        """Its prompt is read, or begins to be."""
        self.started = True
        self._metrics.prompt_tokens.inc(prompt_tokens)

    def made(self, event: TokensMade) -> None:
        """Tokens go to the client."""
        now, tokens = time.monotonic(), len(event.ids)
        if self._last:
            gap = (now - self._last) / tokens
            for _ in range(tokens):
                self._metrics.inter_token_latency.observe(gap)
        else:
            self._metrics.time_to_first_token.observe(now - self._arrived)
        self._last = now
        self._metrics.generated_tokens.inc(tokens)

    def completed(self, event: Finished) -> None:
        metrics, timings, pruning = self._metrics, event.timings, event.pruning
        self.finish_reason = event.reason.name
        metrics.e2e_request.observe(time.monotonic() - self._arrived)
        metrics.request_queue.observe(timings.queue_s)
        if timings.slim_build_s:  # else it never had a view
            metrics.slim_build.observe(timings.slim_build_s)
        density = pruning.mean_density
        for layer, mass in enumerate(pruning.norm_mass):
            metrics.ff_density.labels(layer).observe(density)
            metrics.norm_mass.labels(layer).observe(mass)


class GrpcCall:
    """A call of any method, as the usual ``grpc_server_*`` family counts it: one message in, some
    out. Children are looked up once, for a stream has a message a step."""

    def __init__(self, metrics: Metrics, labels: tuple[str, str, str]) -> None:
        self._metrics = metrics
        self._labels = labels
        self._sent = metrics.grpc_sent.labels(*labels)
        metrics.grpc_started.labels(*labels).inc()
        metrics.grpc_received.labels(*labels).inc()

    def sent(self) -> None:
        self._sent.inc()

    def handled(self, code: str, seconds: float) -> None:
        self._metrics.grpc_handled.labels(*self._labels, code).inc()
        self._metrics.grpc_handling.labels(*self._labels).observe(seconds)


class _Held(Collector):
    """What an engine holds, asked when somebody scrapes."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def describe(self) -> list[GaugeMetricFamily]:
        return []  # known without asking the engine, which has not started yet

    def collect(self) -> Iterator[GaugeMetricFamily]:
        try:
            holdings = self._engine.holdings().result(SCRAPE_S)
        except (EngineStopped, NotInTime):
            return
        sessions = GaugeMetricFamily(
            "griffin_sessions", "By where they are in their lives.", labels=("state",)
        )
        for state, count in holdings.sessions.items():
            sessions.add_metric((state.value,), count)
        yield sessions
        for name, words, value in (
            ("slim_view_bytes", "Of all slim views.", holdings.slim_view_bytes),
            ("kv_cache_bytes", "Of all sessions' KV caches.", holdings.kv_cache_bytes),
            (
                "session_bytes_limit",
                "What slim views and KV caches may hold together.",
                holdings.limit_bytes,
            ),
        ):
            yield GaugeMetricFamily(f"griffin_{name}", words, value=value)
