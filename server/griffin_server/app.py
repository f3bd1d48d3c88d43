"""A server, put together from its settings: a listener, one engine, the role's services."""

from __future__ import annotations

import asyncio

import structlog
import torch

from griffin_core.engine.cpu_share import CpuShare
from griffin_core.engine.engine import Engine
from griffin_core.engine.scheduler import Limits
from griffin_core.errors import BadModelFile, DeviceMemoryExhausted, EngineFault, InvalidRequest
from griffin_core.experts.selection import Selection
from griffin_core.model.generation_config import NO_SAMPLING_DEFAULTS, SamplingDefaults
from griffin_core.model.hub import Progress
from griffin_core.model.load import DTYPES, Model, load_model
from griffin_core.sampling.params import SamplingParams
from griffin_core.slim.costs import ASSUMED_COSTS
from griffin_server.channel import Mail
from griffin_server.generation import convert
from griffin_server.generation.service import GenerationServicer
from griffin_server.handoff.shared_memory import remove_stale_segments
from griffin_server.listener import Listener
from griffin_server.ops.settings import Settings
from griffin_server.ops.tracing import Tracing
from griffin_server.prefill.service import PrefillServicer
from griffin_server.prefill.source import PrefillServer, PrefillServers

log = structlog.get_logger("griffin.app")


def load(settings: Settings, progress: Progress) -> Model:
    """Loads the model the settings name. It may take minutes.

    Raises:
        ModelError, InvalidRequest: see ``load_model``.
    """
    return load_model(
        settings.model,
        dtype=DTYPES.get(settings.dtype),
        device=settings.device,
        progress=progress,
    )


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
        listener: that listens already; None makes one.

    Raises:
        BadModelFile: the model's sampling defaults are wanted and out of range.
    """

    def __init__(self, settings: Settings, model: Model, listener: Listener | None = None) -> None:
        self._settings = settings
        self._sampling_defaults = _sampling_defaults(settings, model)
        self.listener = listener or Listener(settings)
        self.metrics = self.listener.metrics
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
                chunk_tokens=settings.prefill_chunk_tokens
                or model.decoder.backend.default_chunk_tokens,
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
        self._prefill: PrefillServers | None = None

    @property
    def prefill_servers(self) -> PrefillServers | None:
        """The servers that read prompts for this one, once started; None if it asks none."""
        return self._prefill

    async def start(self) -> None:
        """Listens and starts the engine; until that is ready, calls are refused with UNAVAILABLE.

        Raises:
            ListenError: an address is taken or not this machine's.
            DeviceMemoryExhausted: the device has no room for sessions.
            EngineFault: the engine did not come up.
        """
        settings, engine = self._settings, self.engine
        if not self.listener.started:
            await self.listener.start()
        engine.start()
        try:
            await asyncio.shield(asyncio.wrap_future(engine.ready))
        except DeviceMemoryExhausted:  # says all there is to say
            raise
        except Exception as error:
            raise EngineFault(f"the engine did not start: {error}") from error
        mail = Mail()
        await self.listener.open(
            generation=self._generation(mail) if settings.role in ("all", "decode") else None,
            prefill=PrefillServicer(engine, mail) if settings.role in ("all", "prefill") else None,
            tracing=self._tracing,
        )
        log.info(
            "serving",
            address=str(self.listener.address),
            role=settings.role,
            model=engine.model.name,
            dtype=str(engine.model.decoder.dtype).removeprefix("torch."),
            threads=engine.threads,
            session_bytes=engine.session_bytes,
        )

    def _generation(self, mail: Mail) -> GenerationServicer:
        settings, engine = self._settings, self.engine
        if settings.prefill_target:
            remove_stale_segments()
            self._prefill = PrefillServers(
                [
                    PrefillServer(target, engine.model, self.metrics, settings.handoff)
                    for target in settings.prefill_target
                ]
            )
        return GenerationServicer(
            engine,
            self._prefill,
            settings.role,
            mail,
            self.metrics,
            sampling_defaults=self._sampling_defaults,
        )

    async def stop(self) -> None:
        """Says NOT_SERVING, takes no new calls, lets running ones finish for the grace period, ends
        those that have not with UNAVAILABLE, and frees everything."""
        grace_s = self._settings.shutdown_grace_s
        log.info("stopping", active=self.listener.calls.active, grace_s=grace_s)
        await self.listener.drain(grace_s)
        await asyncio.to_thread(self.engine.stop)
        await self.listener.close()
        if self._prefill is not None:
            await self._prefill.close()
        await asyncio.to_thread(self._tracing.close)
        log.info("stopped")

    def hurry(self) -> None:
        """Lets ``stop`` wait no longer for running calls."""
        self.listener.calls.hurry()
