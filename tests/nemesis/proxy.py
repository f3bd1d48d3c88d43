"""A TCP proxy that delays, cuts, holds and swallows."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from enum import Enum


class Mode(Enum):
    """What happens to bytes, in both directions."""

    PASS = "they pass"
    DELAY = "each piece comes 50 ms late"
    HOLD = "none pass, and nobody is told"
    SWALLOW = "they are taken and go nowhere, now and later: TCP passes nothing after a gap"
    CUT = "connections are reset, and new ones refused"


class Wires:
    """The event loop of all proxies, on a thread of its own."""

    def __init__(self) -> None:
        self.loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self.loop.run_forever, daemon=True)
        self._thread.start()
        self._proxies: list[Proxy] = []

    def proxy(self, target: str) -> Proxy:
        """A proxy to host:port that listens."""
        made = Proxy(target)
        self.run(made.start())
        self._proxies.append(made)
        return made

    def run(self, work: object) -> None:
        """Runs a coroutine on the loop, to its end."""
        asyncio.run_coroutine_threadsafe(work, self.loop).result(10)  # type: ignore[arg-type]

    def set(self, proxy: Proxy, mode: Mode) -> None:
        """Changes what a proxy does."""

        async def change() -> None:
            proxy.change(mode)

        self.run(change())

    def close(self) -> None:
        """Ends the loop."""

        async def end() -> None:
            tasks = asyncio.all_tasks() - {asyncio.current_task()}
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

        for proxy in self._proxies:
            self.run(proxy.stop())
        self.run(end())
        self.loop.call_soon_threadsafe(self.loop.stop)
        self._thread.join()
        self.loop.close()


class Proxy:
    """Between a client and the server at ``target``, which may change."""

    def __init__(self, target: str) -> None:
        self.target = target
        self.port = 0
        self._mode = Mode.PASS
        self._passes = asyncio.Event()
        self._passes.set()
        self._writers: set[asyncio.StreamWriter] = set()
        self._deaf: set[asyncio.StreamWriter] = set()

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.port}"

    async def start(self) -> None:
        """Listens on a free port."""
        self._server = await asyncio.start_server(self._take, "127.0.0.1", 0)
        self.port = self._server.sockets[0].getsockname()[1]

    async def stop(self) -> None:
        """Stops listening."""
        self._server.close()

    def change(self, mode: Mode) -> None:
        """On the loop: from now on bytes are treated so."""
        self._mode = mode
        if mode is Mode.HOLD:
            self._passes.clear()
        else:
            self._passes.set()
        if mode is Mode.SWALLOW:
            self._deaf |= self._writers
        if mode is Mode.CUT:
            for writer in tuple(self._writers):
                writer.transport.abort()

    async def _take(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if self._mode is Mode.CUT:
            writer.transport.abort()
            return
        host, _, port = self.target.rpartition(":")
        try:
            there, back = await asyncio.open_connection(host, int(port))
        except OSError:
            writer.transport.abort()
            return
        self._writers |= {writer, back}
        if self._mode is Mode.SWALLOW:
            self._deaf |= {writer, back}
        pumps = [
            asyncio.ensure_future(self._pump(reader, back)),
            asyncio.ensure_future(self._pump(there, writer)),
        ]
        try:
            await asyncio.wait(pumps, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for pump in pumps:
                pump.cancel()
            for each in (writer, back):
                self._writers.discard(each)
                self._deaf.discard(each)
                each.transport.abort()

    async def _pump(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError):
            while data := await reader.read(1 << 16):
                if self._mode is Mode.DELAY:
                    await asyncio.sleep(0.05)
                await self._passes.wait()
                if writer not in self._deaf:
                    writer.write(data)
                    await writer.drain()
