"""A server, put together from its settings: one engine, the role's services, health, reflection."""

from __future__ import annotations

import asyncio
import signal
import socket
from typing import Any

import grpc
import structlog
import torch
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_health.v1.health import aio as health
from grpc_reflection.v1alpha import reflection

from griffin.v1 import generation_pb2, generation_pb2_grpc, prefill_pb2_grpc
from griffin_core.cpu_share import CpuShare
from griffin_core.decode.scheduler import Limits
from griffin_core.engine import Engine
from griffin_core.errors import (
    BadModelFile,
    DeviceMemoryExhausted,
    EngineFault,
    GriffinError,
    InvalidRequest,
)
from griffin_core.experts.selection import Selection
from griffin_core.model.generation_config import NO_SAMPLING_DEFAULTS, SamplingDefaults
from griffin_core.model.load import DTYPES, Model, load_model
from griffin_core.model.source import Progress
from griffin_core.prefill import CHUNK_TOKENS, GPU_CHUNK_TOKENS
from griffin_core.sampling.params import SamplingParams
from griffin_core.slim.costs import ASSUMED_COSTS
from griffin_server.channel import Mail
from griffin_server.generation import convert
from griffin_server.generation.service import GenerationServicer
from griffin_server.handoff.shared_memory import remove_stale_segments
from griffin_server.ops.http import HttpServer
from griffin_server.ops.interceptors import CallInterceptor
from griffin_server.ops.metrics import Metrics
from griffin_server.ops.settings import Settings
from griffin_server.ops.tracing import Tracing
from griffin_server.prefill.service import PrefillServicer
from griffin_server.prefill.source import PREFILL_SERVICE, PrefillServer, PrefillServers

log = structlog.get_logger("griffin.app")

STATUSES_S, WATCHERS_S = 5.0, 2.0
"""How long the last calls have to learn how they ended."""

GENERATION = generation_pb2.DESCRIPTOR.services_by_name["GenerationService"].full_name


class ListenError(GriffinError):
    """An address cannot be listened on.

    Args:
        name: the port's setting.
    """

    def __init__(self, name: str, host: str, port: int, why: object) -> None:
        super().__init__(f"host, {name}: cannot listen on {host}:{port} ({why})")


def load(settings: Settings, progress: Progress) -> Model:
    """Loads the model the settings name, once its ports are known to be free: it may take minutes.

    Raises:
        ListenError: they are not.
        ModelError, InvalidRequest: see ``load_model``.
    """
    for name in ("port", "metrics_port"):
        _check_free(settings.host, name, getattr(settings, name))
    device = settings.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    return load_model(
        settings.model, dtype=DTYPES.get(settings.dtype), device=device, progress=progress
    )


def _check_free(host: str, name: str, port: int) -> None:
    if not port:
        return
    try:
        (family, kind, protocol, _, address), *_ = socket.getaddrinfo(
            host.strip("[]"), port, type=socket.SOCK_STREAM
        )
        with socket.socket(family, kind, protocol) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
    except OSError as error:
        raise ListenError(name, host, port, error.strerror) from error


def _chunk_tokens(device: torch.device) -> int:
    """So many that products run at the device's rate, and no more: streams wait meanwhile."""
    return GPU_CHUNK_TOKENS if device.type == "cuda" else CHUNK_TOKENS


def _prefill_share(device: torch.device) -> float:
    return 1.0 if device.type == "cuda" else 0.5


def _bytes(gib: float | None) -> int | None:
    return None if gib is None else max(1, int(gib * (1 << 30)))


def _sampling_defaults(settings: Settings, model: Model) -> SamplingDefaults:
    """The values of sampling fields that a request does not set; says in the log what they are.

    Raises:
        BadModelFile: those of the model are out of range.
    """
    if settings.sampling_defaults == "greedy":
        return NO_SAMPLING_DEFAULTS
    defaults = model.sampling_defaults
    try:
        SamplingParams(**defaults)  # type: ignore[arg-type]  # checked there, whatever they are
        convert.sampling_defaults_to_pb(defaults)  # what GetModelInfo will tell
    except (InvalidRequest, TypeError, ValueError) as error:
        raise BadModelFile(
            f"model: generation_config.json of {model.name!r} has sampling that cannot be used "
            f"({error})"
        ) from error
    if defaults:
        log.info("sampling defaults of the model", **defaults)
    else:
        log.info(f"{model.name} has no sampling defaults of its own; the default stays greedy")
    return defaults


class App:
    """A running server. ``start`` it, then ``stop`` it; not to be used twice.

    Args:
        model: already loaded.

    Raises:
        BadModelFile: the model's sampling defaults are wanted and out of range.
    """

    def __init__(self, settings: Settings, model: Model) -> None:
        self._settings = settings
        self._sampling_defaults = _sampling_defaults(settings, model)
        self.metrics = Metrics()
        session_bytes = _bytes(settings.session_memory_gib)
        self.engine = Engine(
            model,
            limits=Limits(
                max_sessions=settings.max_sessions,
                max_queue=settings.max_queue,
                session_bytes=0 if settings.role == "prefill" else session_bytes,
                idle_bytes=_bytes(settings.idle_memory_gib),
                memory_fraction=settings.memory_fraction,
                session_ttl_s=settings.session_ttl_s,
                reader_timeout_s=settings.reader_timeout_s,
                chunk_tokens=settings.prefill_chunk_tokens or _chunk_tokens(model.decoder.device),
                prefill_share=settings.prefill_share or _prefill_share(model.decoder.device),
            ),
            cuda_graphs=settings.cuda_graphs and settings.role != "prefill",
            stream_interval=settings.stream_interval or None,
            selection=Selection(density=settings.density, policy=settings.policy),
            sharing=settings.sharing,
            costs=ASSUMED_COSTS if settings.role == "prefill" else None,
            own_prefill_tokens=settings.own_prefill_tokens if settings.prefill_target else None,
            threads=settings.threads or CpuShare(),
            batch_invariant=settings.batch_invariant,
            observer=self.metrics,
        )
        self.metrics.watch(self.engine)
        self._tracing = Tracing(settings.role)
        self._calls = CallInterceptor(self.metrics, self._tracing)
        self._http: HttpServer | None = None
        self._health = health.HealthServicer()
        self._prefill: PrefillServers | None = None
        self._server: Any = None
        self.port = 0
        """The port that is listened on, once started."""

    async def start(self) -> None:
        """Listens and starts the engine; until that is ready, calls are refused with UNAVAILABLE.

        Raises:
            ListenError: an address is taken or not this machine's.
            DeviceMemoryExhausted: the device has no room for sessions.
            EngineFault: the engine did not come up.
        """
        settings = self._settings
        self._server = grpc.aio.server(
            interceptors=(self._calls,),
            options=[
                ("grpc.max_receive_message_length", settings.max_request_bytes),
                ("grpc.so_reuseport", 0),  # a second server on the port is a mistake, not a friend
                # Clients may ping this often to notice a dead server.
                ("grpc.http2.min_ping_interval_without_data_ms", 5_000),
                # A client that has vanished without a word gives its session back.
                ("grpc.keepalive_time_ms", 20_000),
                ("grpc.keepalive_timeout_ms", 10_000),
            ],
        )
        services = self._add_services()
        try:
            self.port = self._server.add_insecure_port(f"{settings.host}:{settings.port}")
        except RuntimeError as error:
            raise ListenError("port", settings.host, settings.port, error) from error
        for name in ("", *services):
            await self._health.set(name, health_pb2.HealthCheckResponse.NOT_SERVING)
        if settings.metrics_port:
            try:
                self._http = HttpServer(
                    settings.host,
                    settings.metrics_port,
                    self.metrics.registry,
                    lambda: self._calls.serving,
                )
            except OSError as error:
                raise ListenError(
                    "metrics_port", settings.host, settings.metrics_port, error
                ) from error
        self.engine.start()
        await self._server.start()
        try:
            await asyncio.shield(asyncio.wrap_future(self.engine.ready))
        except DeviceMemoryExhausted:  # says all there is to say
            raise
        except Exception as error:
            raise EngineFault(f"the engine did not start: {error}") from error
        self._calls.open()
        for name in ("", *services):
            await self._health.set(name, health_pb2.HealthCheckResponse.SERVING)
        log.info(
            "serving",
            address=f"{settings.host}:{self.port}",
            role=settings.role,
            model=self.engine.model.name,
            dtype=str(self.engine.model.decoder.dtype).removeprefix("torch."),
            threads=self.engine.threads,
            session_bytes=self.engine.session_bytes,
        )

    def _add_services(self) -> list[str]:
        """Registers what the role serves and returns the names."""
        settings, engine, services = self._settings, self.engine, []
        mail = Mail()
        if settings.role in ("all", "decode"):
            if settings.prefill_target:
                remove_stale_segments()
                self._prefill = PrefillServers(
                    [
                        PrefillServer(target, engine.model, self.metrics, settings.handoff)
                        for target in settings.prefill_target
                    ]
                )
            generation_pb2_grpc.add_GenerationServiceServicer_to_server(
                GenerationServicer(
                    engine,
                    self._prefill,
                    settings.role,
                    mail,
                    self.metrics,
                    sampling_defaults=self._sampling_defaults,
                ),
                self._server,
            )
            services.append(GENERATION)
        if settings.role in ("all", "prefill"):
            prefill_pb2_grpc.add_PrefillServiceServicer_to_server(
                PrefillServicer(engine, mail), self._server
            )
            services.append(PREFILL_SERVICE)
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)
        reflection.enable_server_reflection(
            (
                *services,
                health_pb2.DESCRIPTOR.services_by_name["Health"].full_name,
                reflection.SERVICE_NAME,
            ),
            self._server,
        )
        return services

    async def stop(self) -> None:
        """Says NOT_SERVING, takes no new calls, lets running ones finish for the grace period, ends
        those that have not with UNAVAILABLE, and frees everything."""
        log.info("stopping", active=self._calls.active, grace_s=self._settings.shutdown_grace_s)
        await self._health.enter_graceful_shutdown()
        await self._calls.close(self._settings.shutdown_grace_s)
        await asyncio.to_thread(self.engine.stop)
        if self._http is not None:
            await asyncio.to_thread(self._http.close)
        # What is left are statuses on their way, and watchers of health, who would never end.
        await self._server.stop(STATUSES_S if self._calls.active else WATCHERS_S)
        if self._prefill is not None:
            await self._prefill.close()
        await asyncio.to_thread(self._tracing.close)
        log.info("stopped")

    def hurry(self) -> None:
        """Lets ``stop`` wait no longer for running calls."""
        self._calls.hurry()


async def run(settings: Settings, model: Model) -> None:
    """Serves until SIGTERM or SIGINT; a second one ends what still runs.

    Raises:
        ListenError: see ``App.start``.
        EngineFault: a bug has ended the engine; whoever supervises the process starts a new one.
    """
    app = App(settings, model)
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()

    def signal_came() -> None:
        if stop.is_set():
            app.hurry()
        stop.set()

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, signal_came)
    signalled = asyncio.create_task(stop.wait())
    starting = asyncio.create_task(app.start())
    await asyncio.wait((signalled, starting), return_when=asyncio.FIRST_COMPLETED)
    if not starting.done():  # told to stop before it was ready
        await app.stop()
        await asyncio.wait((starting,))
        return
    starting.result()
    ended = asyncio.wrap_future(app.engine.ended)
    waited: set[asyncio.Future[Any]] = {signalled, ended}
    await asyncio.wait(waited, return_when=asyncio.FIRST_COMPLETED)
    signalled.cancel()
    await app.stop()
    if fault := ended.exception():
        raise EngineFault(f"the engine ended: {type(fault).__name__}: {fault}")
