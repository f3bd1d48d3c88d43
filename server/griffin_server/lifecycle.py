"""A server process from start to end: it listens, loads the model on a thread, serves and drains.

Health checks must be answered from the first second on, so this module imports neither torch nor
transformers nor anything that needs them. They are imported by the thread that loads the model.
"""

from __future__ import annotations

import asyncio
import os
import signal
import threading
from collections.abc import Awaitable, Callable
from concurrent.futures import Future
from typing import TYPE_CHECKING, Any

import structlog

from griffin_core.errors import EngineFault, GriffinError
from griffin_server.listener import Listener
from griffin_server.settings import Settings

if TYPE_CHECKING:
    from griffin_core.model.load import Model

log = structlog.get_logger("griffin.app")


class NotImported(GriffinError):
    """torch cannot be imported in this environment."""

    def __init__(self, error: OSError) -> None:
        super().__init__(
            f"torch cannot be imported: {error}. It needs a directory for temporary files that can "
            "be written; TMPDIR names one"
        )


async def serve(settings: Settings, progress: Callable[[str], None]) -> None:
    """Serves until SIGTERM or SIGINT. A second signal ends the calls that still run. A signal while
    the model loads ends the process at once, with exit status 128 plus its number.

    Args:
        progress: called with a message at each slow part of loading.

    Raises:
        ListenError: an address is in use or does not belong to this machine.
        NotImported: torch found no directory for temporary files.
        ModelError, InvalidRequest: see ``load_model``.
        EngineFault: a bug ended the engine. The process's supervisor should start a new one.
    """
    signals = _Signals()
    listener = Listener(settings)
    try:
        await listener.start()
        log.info("listening", address=str(listener.address), role=settings.role)
        loading = asyncio.wrap_future(_load(settings, progress))
        if await signals.or_else(loading):
            model = loading.result()
        else:  # a thread that loads cannot be ended
            await listener.close()
            os._exit(128 + signals.number)
        from griffin_server.app import App  # noqa: PLC0415  # the loading thread has imported it

        app = App(settings, model, listener)
        signals.on_second = app.force_stop
        starting = asyncio.create_task(app.start())
        if await signals.or_else(starting):
            starting.result()
    except BaseException:
        await listener.close()
        raise
    if not starting.done():  # a signal came before the engine was ready
        await app.stop()
        await asyncio.wait((starting,))
        return
    ended = asyncio.wrap_future(app.engine.ended)
    await signals.or_else(ended)
    await app.stop()
    if app.stuck:  # the interpreter would wait for what the thread holds
        os._exit(1)
    if fault := ended.exception():
        raise EngineFault.of(fault, "the engine ended: ")


def _load(settings: Settings, progress: Callable[[str], None]) -> Future[Model]:
    """Loads the model on a daemon thread, which does not keep the process from ending."""
    loaded: Future[Model] = Future()

    def work() -> None:
        try:
            try:
                from griffin_server.app import load  # noqa: PLC0415  # imports torch
            except OSError as error:  # torch creates a directory for compiled code
                raise NotImported(error) from error
            loaded.set_result(load(settings, progress))
        except BaseException as error:
            loaded.set_exception(error)

    threading.Thread(target=work, name="griffin-import", daemon=True).start()
    return loaded


class _Signals:
    """SIGTERM and SIGINT, handled by the event loop."""

    def __init__(self) -> None:
        self.number = 0
        """The number of the first signal; 0 before it."""
        self.on_second: Callable[[], None] = lambda: None
        """Called at each later signal."""
        self._came = asyncio.Event()
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._take, number)

    def _take(self, number: int) -> None:
        if self._came.is_set():
            self.on_second()
        self.number = self.number or number
        self._came.set()

    async def or_else(self, other: asyncio.Future[Any] | Awaitable[Any]) -> bool:
        """Waits for a signal or for ``other``. Returns whether ``other`` is done."""
        signalled = asyncio.ensure_future(self._came.wait())
        waited = asyncio.ensure_future(other)
        await asyncio.wait((signalled, waited), return_when=asyncio.FIRST_COMPLETED)
        signalled.cancel()
        return waited.done()
