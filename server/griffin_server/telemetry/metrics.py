"""Every metric of a server: names, help texts, buckets and labels. ``/metrics`` shows them.

Times are in seconds on one process's monotonic clock. No label contains a session or request id, so
the number of series is bounded by layers, status codes and methods.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, get_args

import grpc
from prometheus_client import CollectorRegistry, Counter, Histogram, Summary

from griffin_core.engine.ports import Observer
from griffin_core.errors import GriffinError
from griffin_core.spec.choices import DraftSource
from griffin_server.rpc.status import CODES, code_of, code_of_cancel
from griffin_server.telemetry.audit import audit
from griffin_server.telemetry.engine_gauges import EngineGauges

if TYPE_CHECKING:  # they bring torch, and a server answers before that is imported
    from griffin_core.engine.engine import Engine
    from griffin_core.engine.events import Finished, TokensMade
    from griffin_core.experts.slim_spec import SlimSpec
    from griffin_core.forward.events import (
        PrefillFinished,
    )
    from griffin_server.transfer.shape import HandoffShape

FINE = (*(round(1e-3 * 10 ** (step / 17), 6) for step in range(52)), 2.0, 5.0, 10.0)
"""Buckets in seconds, from 1 ms to 1 s by a ratio of 1.145, so that a speedup of 1.25 shows."""

COARSE = tuple(round(1e-3 * 10 ** (step / 5), 6) for step in range(26))
"""Buckets in seconds, from 1 ms to 100 s by a ratio of 1.58."""

SIZES = tuple(float(1 << power) for power in range(11))
"""Buckets of batch sizes."""

MOST_REMEMBERED = 32
"""The most sizes of expert sets for which the last set is kept."""

ORIGINS = {
    "READER_TOO_SLOW": "slow_reader",
    "SESSION_CLOSED": "closed",
    "DEADLINE_PASSED": "deadline",
}
"""The cause of a request's end, by the reason of its error; for other reasons it is the server."""

REASONS = sorted({reason for _, reason in CODES.values()})
"""The reasons by which rejections are counted."""


class Metrics(Observer):
    """The metrics of one server, in its own registry."""

    def __init__(self) -> None:
        self.registry = registry = CollectorRegistry()

        def histogram(name: str, help: str, buckets: tuple[float, ...] = COARSE) -> Histogram:
            return Histogram(name, help, buckets=buckets, registry=registry)

        def counter(name: str, help: str, labels: tuple[str, ...] = ()) -> Counter:
            return Counter(name, help, labels, registry=registry)

        def by_layer(name: str, help: str) -> Summary:
            return Summary(name, help, ("layer",), registry=registry)

        self.time_to_first_token = histogram(
            "griffin_time_to_first_token_seconds", "Time from a call's arrival to its first token."
        )
        self.inter_token_latency = histogram(
            "griffin_inter_token_latency_seconds",
            "Time between two tokens of a completion. The tokens of one message share its time.",
            FINE,
        )
        self.e2e_request = histogram(
            "griffin_e2e_request_seconds",
            "Time from a call's arrival to the end of its completion.",
        )
        self.request_queue = histogram(
            "griffin_request_queue_seconds", "Time from a call's arrival to its admission."
        )
        self.prefill = histogram(
            "griffin_prefill_seconds", "Time to run a prompt on this server's model."
        )
        self.expert_selection = histogram(
            "griffin_expert_selection_seconds",
            "Time to select a prompt's experts, which is part of its prefill.",
            tuple(second / 100 for second in COARSE),
        )
        self.slim_build = histogram(
            "griffin_slim_build_seconds",
            "Time from the end of a prefill until its session's slim view is built.",
        )
        self.handoff = histogram(
            "griffin_handoff_seconds",
            "Time to pull a prefill from a prefill server, including the prefill itself.",
        )
        self.handoff_bytes = counter(
            "griffin_handoff_bytes_total",
            "Bytes of verified handoffs, by what they hold and how they were transferred.",
            ("kind", "transport"),
        )
        self.decode_step = histogram(
            "griffin_decode_step_seconds", "Time of a decode step of all live sessions.", FINE
        )
        self.batch_size = histogram("griffin_batch_size", "Sessions in a decode step.", SIZES)
        self.ff_density = by_layer(
            "griffin_ff_density_ratio",
            "Fraction of a layer's FF neurons that a completion ran on, averaged over its tokens.",
        )
        self.norm_mass = by_layer(
            "griffin_expert_norm_mass_ratio",
            "Fraction of the prompt's activation norm mass that a completion's experts hold.",
        )
        self.jaccard = Histogram(
            "griffin_expert_jaccard_ratio",
            "Jaccard similarity of a prompt's experts with those of the last prompt that kept as "
            "many, averaged over layers.",
            buckets=tuple(part / 20 for part in range(1, 21)),
            registry=registry,
        )
        self.prompt_tokens = counter(
            "griffin_prompt_tokens_total", "Tokens of prompts that were processed."
        )
        self.generated_tokens = counter(
            "griffin_generated_tokens_total", "Generated tokens sent to clients."
        )
        self.checked_tokens = counter(
            "griffin_checked_tokens_total",
            "Tokens of pruned completions that all neurons were run on once more.",
        )
        self.agreed_tokens = counter(
            "griffin_agreed_tokens_total", "Checked tokens that all neurons would have drawn too."
        )
        self.drafted_tokens = counter(
            "griffin_drafted_tokens_total",
            "Tokens drafted by speculation, by source: lookup or slim.",
            ("source",),
        )
        self.accepted_tokens = counter(
            "griffin_accepted_tokens_total",
            "Drafted tokens that the model drew too, by source.",
            ("source",),
        )
        self.requests = counter(
            "griffin_requests_total",
            "Ended calls of Generate, Score and AnalyzePrompt. Only completed ones have a reason.",
            ("code", "finish_reason"),
        )
        self.rejections = counter(
            "griffin_rejections_total",
            "Requests refused before their prompt was processed.",
            ("reason",),
        )
        self.aborts = counter(
            "griffin_aborts_total",
            "Requests that ended before they completed, by cause: the client, the deadline, a slow "
            "reader, a call that closed the session, or this server.",
            ("origin",),
        )
        method = ("grpc_type", "grpc_service", "grpc_method")
        self.grpc_started = counter(
            "grpc_server_started_total", "RPCs started on the server.", method
        )
        self.grpc_handled = counter(
            "grpc_server_handled_total",
            "RPCs completed on the server, by status code.",
            (*method, "grpc_code"),
        )
        self.grpc_received = counter(
            "grpc_server_msg_received_total", "Request messages received.", method
        )
        self.grpc_sent = counter("grpc_server_msg_sent_total", "Response messages sent.", method)
        self.grpc_handling = Histogram(
            "grpc_server_handling_seconds",
            "Time to handle an RPC.",
            method,
            buckets=COARSE,
            registry=registry,
        )
        for source in get_args(DraftSource):
            self.drafted_tokens.labels(source)
            self.accepted_tokens.labels(source)
        for reason in REASONS:  # at zero, so that the first one shows as an increase
            self.rejections.labels(reason)
        for origin in {*ORIGINS.values(), "client", "server"}:
            self.aborts.labels(origin)
        self._last_experts: dict[tuple[int, ...], SlimSpec] = {}
        self._compares = ThreadPoolExecutor(1, thread_name_prefix="griffin-overlap")

    def watch(self, engine: Engine) -> None:
        """Adds gauges of an engine's sessions and memory, read at each scrape."""
        self.registry.register(EngineGauges(engine))

    # -- called by the engine --------------------------------------------------------------------

    def stepped(self, seconds: float, sessions: int) -> None:
        self.decode_step.observe(seconds)
        self.batch_size.observe(sessions)

    def prefilled(self, event: PrefillFinished) -> None:
        self.prefill.observe(event.compute_s)
        self.expert_selection.observe(event.selection_s)

    def speculated(self, source: DraftSource, drafted: int, accepted: int) -> None:
        self.drafted_tokens.labels(source).inc(drafted)
        self.accepted_tokens.labels(source).inc(accepted)

    def checked(self, tokens: int, agreed: int) -> None:
        self.checked_tokens.inc(tokens)
        self.agreed_tokens.inc(agreed)

    def chose(self, slim: SlimSpec) -> None:
        if not slim.prunes:
            return
        if (before := self._last_experts.get(slim.counts)) is not None:
            if slim.experts.device.type == "cpu":
                self._compare(slim, before)
            else:  # on a thread, since the copy to the host waits for the device
                self._compares.submit(self._compare, slim, before)
        elif len(self._last_experts) >= MOST_REMEMBERED:
            self._last_experts.pop(next(iter(self._last_experts)))
        self._last_experts[slim.counts] = slim

    def _compare(self, slim: SlimSpec, before: SlimSpec) -> None:
        overlaps = slim.jaccard(before)
        self.jaccard.observe(sum(overlaps) / len(overlaps))

    # -- called by servicers and interceptors ----------------------------------------------------

    @contextmanager
    def request(
        self, arrived: float, context: grpc.aio.ServicerContext[Any, Any]
    ) -> Iterator[Request]:
        """Counts a call of Generate, Score or AnalyzePrompt, and its end.

        Args:
            arrived: the time of its arrival on ``time.monotonic``.
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
        """Counts a call of a method "/package.Service/Method"."""
        _, service, name = method.split("/")
        return GrpcCall(self, (kind, service, name))

    def handed_over(self, shape: HandoffShape, transport: str, seconds: float) -> None:
        """Counts a complete handoff."""
        self.handoff.observe(seconds)
        for kind, size in shape.bytes_by_kind().items():
            self.handoff_bytes.labels(kind, transport).inc(size)


class Request:
    """The counts of one call of Generate, Score or AnalyzePrompt."""

    def __init__(self, metrics: Metrics, arrived: float) -> None:
        self._metrics = metrics
        self._arrived = arrived
        self._last = 0.0
        self._audit = audit()
        self.started = False
        """Whether its prompt has been processed, or has begun to be."""
        self.finish_reason = ""

    def read(self, prompt_tokens: int) -> None:
        """Counts its prompt."""
        self.started = True
        self._audit.prompt_tokens += prompt_tokens
        self._metrics.prompt_tokens.inc(prompt_tokens)

    def made(self, event: TokensMade) -> None:
        """Counts tokens that are sent to the client."""
        now, tokens = time.monotonic(), len(event.ids)
        if self._last:
            gap = (now - self._last) / tokens
            for _ in range(tokens):
                self._metrics.inter_token_latency.observe(gap)
        else:
            self._metrics.time_to_first_token.observe(now - self._arrived)
        self._last = now
        self._audit.generated_tokens += tokens
        self._metrics.generated_tokens.inc(tokens)

    def completed(self, event: Finished) -> None:
        """Counts its completion."""
        metrics, timings, pruning = self._metrics, event.timings, event.pruning
        self.finish_reason = event.reason.name
        metrics.e2e_request.observe(time.monotonic() - self._arrived)
        metrics.request_queue.observe(timings.queue_s)
        if timings.slim_build_s:  # zero without a view
            metrics.slim_build.observe(timings.slim_build_s)
        density = pruning.mean_density
        for layer, mass in enumerate(pruning.norm_mass):
            metrics.ff_density.labels(layer).observe(density)
            metrics.norm_mass.labels(layer).observe(mass)


class GrpcCall:
    """The counts of one call of any method, in the usual ``grpc_server_*`` metrics: one message
    received, and any number sent. The sent counter is looked up once, since a stream sends a
    message at each step."""

    def __init__(self, metrics: Metrics, labels: tuple[str, str, str]) -> None:
        self._metrics = metrics
        self._labels = labels
        self._sent = metrics.grpc_sent.labels(*labels)
        self._audit = audit()
        metrics.grpc_started.labels(*labels).inc()
        metrics.grpc_received.labels(*labels).inc()

    def sent(self, size: int) -> None:
        """Counts a response message of so many bytes."""
        self._sent.inc()
        self._audit.response_bytes += size

    def handled(self, code: str, seconds: float) -> None:
        """Counts the end of the call, by the name of its status code."""
        self._metrics.grpc_handled.labels(*self._labels, code).inc()
        self._metrics.grpc_handling.labels(*self._labels).observe(seconds)
