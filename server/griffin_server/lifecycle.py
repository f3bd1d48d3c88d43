"""`griffin serve`: listens first, then imports and loads the model on a thread, then serves.

Whoever asks whether the server lives is answered from its first second on. So what this module
imports is light; torch, transformers and all that needs them comes with the load.
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
    """What the model needs cannot be imported in these surroundings."""

    def __init__(self, error: OSError) -> None:
        super().__init__(
            f"torch cannot be imported: {error}. It needs a directory for temporary files that can "
            "be written; TMPDIR names one"
        )


async def serve(settings: Settings, progress: Callable[[str], None]) -> None:
    """Serves until SIGTERM or SIGINT; a second one ends what still runs. One that comes before the
    model is loaded ends the process at once, with 128 and its number.

    Args:
        progress: told about each slow part of loading.

    Raises:
        ListenError: an address is taken or not this machine's.
        NotImported: there is no directory for temporary files.
        ModelError, InvalidRequest: see ``load_model``.
        EngineFault: a bug has ended the engine; whoever supervises the process starts a new one.
    """
    signals = _Signals()
    listener = Listener(settings)
    try:
        await listener.start()
        log.info("listening", address=str(listener.address), role=settings.role)
        loading = asyncio.wrap_future(_load(settings, progress))
        if await signals.or_else(loading):
            model = loading.result()
        else:  # nothing ends a thread that loads
            await listener.close()
            os._exit(128 + signals.number)
        from griffin_server.app import App  # noqa: PLC0415  # imported by now

        app = App(settings, model, listener)
        signals.again = app.hurry
        starting = asyncio.create_task(app.start())
        if await signals.or_else(starting):
            starting.result()
    except BaseException:
        await listener.close()
        raise
    if not starting.done():  # told to stop before it was ready
        await app.stop()
        await asyncio.wait((starting,))
        return
    ended = asyncio.wrap_future(app.engine.ended)
    await signals.or_else(ended)
    await app.stop()
    if fault := ended.exception():
        raise EngineFault(f"the engine ended: {type(fault).__name__}: {fault}")


def _load(settings: Settings, progress: Callable[[str], None]) -> Future[Model]:
    """Loads the model on a thread of its own that does not keep the process from ending."""
    loaded: Future[Model] = Future()

    def work() -> None:
        try:
            try:
                from griffin_server.app import load  # noqa: PLC0415  # it brings torch
            except OSError as error:  # torch makes a directory for what it compiles
                raise NotImported(error) from error
            loaded.set_result(load(settings, progress))
        except BaseException as error:
            loaded.set_exception(error)

    threading.Thread(target=work, name="griffin-import", daemon=True).start()
    return loaded


class _Signals:
    """SIGTERM and SIGINT, once they are the loop's."""

    def __init__(self) -> None:
        self.number = 0
        """The first that came; 0 if none did."""
        self.again: Callable[[], None] = lambda: None
        """Called when another one comes."""
        self._came = asyncio.Event()
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._take, number)

    def _take(self, number: int) -> None:
        if self._came.is_set():
            self.again()
        self.number = self.number or number
        self._came.set()

    async def or_else(self, other: asyncio.Future[Any] | Awaitable[Any]) -> bool:
        """Waits for a signal or for something else. Whether the latter is done."""
        signalled = asyncio.ensure_future(self._came.wait())
        waited = asyncio.ensure_future(other)
        await asyncio.wait((signalled, waited), return_when=asyncio.FIRST_COMPLETED)
        signalled.cancel()
        return waited.done()
