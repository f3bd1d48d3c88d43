"""The channel to a prefill server, made anew when the files of its TLS change."""

from __future__ import annotations

import asyncio

import grpc

from griffin_server.connections import PREFILL_CHANNEL_OPTIONS
from griffin_server.security.files import WatchedFiles

OLD_CALLS_S = 3600.0
"""Seconds that the calls of a channel go on at most after a newer one has taken its place."""


class PrefillChannel:
    """A channel that is created when it is first asked for.

    Args:
        target: the server's gRPC name.
        credentials: None does without TLS.
    """

    def __init__(
        self, target: str, credentials: WatchedFiles[grpc.ChannelCredentials] | None
    ) -> None:
        self._target = target
        self._credentials = credentials
        self._made_with: grpc.ChannelCredentials | None = None
        self._channel: grpc.aio.Channel | None = None
        self._closing: set[asyncio.Task[None]] = set()

    @property
    def current(self) -> grpc.aio.Channel:
        """The channel for a call that begins now. Calls that run go on over theirs."""
        credentials = self._credentials.value if self._credentials is not None else None
        if self._channel is None or credentials is not self._made_with:
            if self._channel is not None:
                closing = asyncio.create_task(self._channel.close(OLD_CALLS_S))
                self._closing.add(closing)
                closing.add_done_callback(self._closing.discard)
            self._made_with = credentials
            self._channel = (
                grpc.aio.insecure_channel(self._target, options=PREFILL_CHANNEL_OPTIONS)
                if credentials is None
                else grpc.aio.secure_channel(
                    self._target, credentials, options=PREFILL_CHANNEL_OPTIONS
                )
            )
        return self._channel

    async def close(self) -> None:
        """Ends all calls."""
        for closing in tuple(self._closing):
            closing.cancel()
        await asyncio.gather(*self._closing, return_exceptions=True)
        if self._channel is not None:
            await self._channel.close()
