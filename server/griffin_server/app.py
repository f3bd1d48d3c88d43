"""A server, built from its settings: a listener, one engine, and the services of its role."""

from __future__ import annotations

import asyncio

import structlog
import torch

from griffin_core.engine.cpu_share import CpuShare
from griffin_core.engine.engine import Engine
from griffin_core.engine.limits import Limits
from griffin_core.errors import BadModelFile, DeviceMemoryExhausted, EngineFault, InvalidRequest
from griffin_core.experts.selection import default_selection
from griffin_core.model.generation_config import NO_SAMPLING_DEFAULTS, SamplingDefaults
from griffin_core.model.hub import Progress
from griffin_core.model.load import DTYPES, Model, load_model
from griffin_core.sampling.params import SamplingParams
from griffin_core.slim.costs import ASSUMED_COSTS
from griffin_server.listener import Listener
from griffin_server.prefill_pool.client import PrefillClient
from griffin_server.prefill_pool.router import PrefillRouter
from griffin_server.prefill_pool.source import PoolSource, TurnContexts
from griffin_server.rpc.generation import GenerationServicer
from griffin_server.rpc.messages.model_info import sampling_defaults_to_pb
from griffin_server.rpc.output_queue import LoopBridge
from griffin_server.rpc.prefill import PrefillServicer
from griffin_server.rpc.token_rate import TokenRate
from griffin_server.security.tls import prefill_credentials
from griffin_server.settings import Settings
from griffin_server.telemetry.tracing import Tracing
from griffin_server.transfer.descriptors import DescriptorSocket

log = structlog.get_logger("griffin.app")

WATCH_S, STUCK_STOP_S = 1.0, 2.0
"""The seconds between two looks at whether the engine is stuck, and those that a stuck engine has
to stop."""


def load(settings: Settings, progress: Progress) -> Model:
    """Loads the model that the settings name, which may take minutes.

    Raises:
        ModelError, InvalidRequest: see ``load_model``.
    """
    return load_model(
        settings.model,
        dtype=DTYPES.get(settings.dtype),
        device=settings.device,
        allow_pickle=settings.allow_pickle,
        calibration=settings.calibration,
        progress=progress,
    )


def _prefill_share(device: torch.device) -> float:
    return 1.0 if device.type == "cuda" else 0.5


def _bytes(gib: float | None) -> int | None:
    return None if gib is None else max(1, int(gib * (1 << 30)))


def _owner_sessions(settings: Settings) -> int | None:
    if settings.max_caller_sessions is None and settings.asks_who_calls:
        return max(1, settings.max_sessions * 3 // 4)
    return settings.max_caller_sessions


def _sampling_defaults(settings: Settings, model: Model) -> SamplingDefaults:
    """The values of sampling fields that a request does not set, which are also logged.

    Raises:
        BadModelFile: the model's own defaults are out of range.
    """
    if settings.sampling_defaults == "greedy":
        return NO_SAMPLING_DEFAULTS
    defaults = model.sampling_defaults
    try:
        SamplingParams(**defaults)  # type: ignore[arg-type]  # it checks them
        sampling_defaults_to_pb(defaults)  # as GetModelInfo will do
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
    """A server that runs from ``start`` to ``stop``. It cannot be started twice.

    Args:
        model: the loaded model.
        listener: a listener that has been started; None creates one.

    Raises:
        BadModelFile: the settings ask for the model's sampling defaults, and they are out of range.
    """

    def __init__(self, settings: Settings, model: Model, listener: Listener | None = None) -> None:
        self._settings = settings
        model.tokenizer.control_tokens_in_content = settings.control_tokens_in_content
        self._sampling_defaults = _sampling_defaults(settings, model)
        self.listener = listener or Listener(settings)
        self.metrics = self.listener.metrics
        self._contexts = TurnContexts()
        self._source = PoolSource(self._contexts)
        self._rate = TokenRate(settings.max_caller_tokens, settings.limits_storage)
        session_bytes = _bytes(settings.session_memory_gib)
        self.engine = Engine(
            model,
            limits=Limits(
                max_sessions=settings.max_sessions,
                max_owner_sessions=_owner_sessions(settings),
                owner_share=settings.max_caller_memory,
                max_owner_queue=settings.max_caller_queue,
                max_queue=settings.max_queue,
                session_bytes=0 if settings.role == "prefill" else session_bytes,
                idle_bytes=_bytes(settings.idle_memory_gib),
                memory_fraction=settings.memory_fraction,
                session_ttl_s=settings.session_ttl_s,
                reader_timeout_s=settings.reader_timeout_s,
                chunk_tokens=settings.prefill_chunk_tokens
                or model.decoder.backend.default_chunk_tokens,
                prefill_share=settings.prefill_share or _prefill_share(model.decoder.device),
            ),
            cuda_graphs=settings.cuda_graphs and settings.role != "prefill",
            stream_interval=settings.stream_interval or None,
            selection=default_selection(
                settings.density,
                policy=settings.policy,
                correction=settings.correction,
                rank=settings.correction_rank,
                warmup_tokens=settings.warmup_tokens,
                calibration=model.decoder.calibration,
            ),
            speculation=settings.speculation,
            agreement_floor=settings.agreement_floor,
            sharing=settings.sharing,
            costs=ASSUMED_COSTS if settings.role == "prefill" else None,
            prefill_source=self._source if settings.prefill_target else None,
            local_prefill_max_tokens=settings.local_prefill_max_tokens,
            threads=settings.threads or CpuShare(),
            batch_invariant=settings.batch_invariant,
            share_across_owners=settings.share_across_owners,
            observer=self.metrics,
        )
        self.metrics.watch(self.engine)
        self._tracing = Tracing(settings.role)
        self._prefill: PrefillRouter | None = None
        self._descriptors: DescriptorSocket | None = None
        self._watch: asyncio.Task[None] | None = None
        self.stuck = False
        """Whether the engine's thread did not end at ``stop``; then the process has to."""

    @property
    def prefill_router(self) -> PrefillRouter | None:
        """The router to the prefill servers, once started; None in a role without any."""
        return self._prefill

    async def start(self) -> None:
        """Listens and starts the engine. Until the engine is ready, calls end with UNAVAILABLE.

        Raises:
            ListenError: an address is in use or does not belong to this machine.
            DeviceMemoryExhausted: the device has no memory left for sessions.
            EngineFault: the engine did not start.
        """
        settings, engine = self._settings, self.engine
        if not self.listener.started:
            await self.listener.start()
        engine.start()
        try:
            await asyncio.shield(asyncio.wrap_future(engine.ready))
        except DeviceMemoryExhausted:  # its message needs no addition
            raise
        except Exception as error:
            raise EngineFault(f"the engine did not start: {error}") from error
        bridge = LoopBridge()
        self._watch = asyncio.create_task(self._watch_engine())
        await self.listener.open(
            generation=self._generation(bridge) if settings.role != "prefill" else None,
            prefill=PrefillServicer(engine, bridge, self.listener.handoff_directory)
            if settings.prefill_address is not None
            else None,
            tracing=self._tracing,
            context_length=engine.model.decoder.spec.context_length,
        )
        prefill = {}
        if settings.role == "all" and self.listener.prefill_address is not None:
            prefill = {"prefill_address": str(self.listener.prefill_address)}
        log.info(
            "serving",
            address=str(self.listener.address),
            **prefill,
            role=settings.role,
            model=engine.model.name,
            dtype=str(engine.model.decoder.dtype).removeprefix("torch."),
            threads=engine.threads,
            session_bytes=engine.session_bytes,
        )

    def _generation(self, bridge: LoopBridge) -> GenerationServicer:
        settings, engine = self._settings, self.engine
        if settings.prefill_target:
            directory = self.listener.handoff_directory
            self._descriptors = DescriptorSocket(directory) if directory else None
            credentials = prefill_credentials(settings)
            self._prefill = PrefillRouter(
                [
                    PrefillClient(
                        target,
                        engine.model,
                        self.metrics,
                        settings.handoff,
                        settings.handoff_timeout_s,
                        self._descriptors,
                        credentials,
                    )
                    for target in settings.prefill_target
                ]
            )
            self._source.open(self._prefill)
        return GenerationServicer(
            engine,
            self._contexts,
            settings.role,
            bridge,
            self.metrics,
            sampling_defaults=self._sampling_defaults,
            rate=self._rate,
        )

    async def stop(self) -> None:
        """Reports NOT_SERVING, refuses new calls, waits for running ones until the grace is over,
        ends the others with UNAVAILABLE, and frees everything."""
        if self._watch is not None:
            self._watch.cancel()
        stuck_after_s = self._settings.stuck_after_s
        # Calls of an engine that is stuck will not end by themselves.
        grace_s = 0.0 if self.engine.stuck(stuck_after_s) else self._settings.shutdown_grace_s
        log.info("stopping", active=self.listener.drain.active, grace_s=grace_s)
        await self.listener.stop_serving(grace_s)
        wait_s = STUCK_STOP_S if self.engine.stuck(stuck_after_s) else stuck_after_s
        self.stuck = not await asyncio.to_thread(self.engine.stop, wait_s)
        if self.stuck:
            log.error("the engine is stuck and does not stop", waited_s=wait_s)
        await self.listener.close()
        await self._source.close()
        await self._rate.close()
        if self._prefill is not None:
            await self._prefill.close()
        if self._descriptors is not None:
            await asyncio.to_thread(self._descriptors.close)
        await asyncio.to_thread(self._tracing.close)
        log.info("stopped")

    async def _watch_engine(self) -> None:
        """Lets health say so while the engine is stuck."""
        while True:
            await asyncio.sleep(WATCH_S)
            stuck = self.engine.stuck(self._settings.stuck_after_s)
            if stuck and not self.listener.stuck:
                log.error("the engine is stuck", stuck_after_s=self._settings.stuck_after_s)
            await self.listener.set_stuck(stuck)

    def force_stop(self) -> None:
        """Lets ``stop`` end running calls at once."""
        self.listener.drain.force_stop()
