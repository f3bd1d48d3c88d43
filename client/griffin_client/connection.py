"""The channel of a client, made anew when the files of its TLS change."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from typing import Any, Generic, TypeVar

import grpc

from griffin.v1 import generation_pb2_grpc
from griffin_client.channel import Tls
from griffin_client.errors import InvalidArgument

C = TypeVar("C")  # the channel: grpc.Channel or grpc.aio.Channel

OLD_CHANNELS = 4
"""The most channels that are kept for calls that began before the files changed. Calls that outlast
as many changes may be cancelled."""


class Connection(Generic[C]):
    """A channel and its stub. Safe to share between threads.

    Calls that run when the files change go on over their channel. Files that cannot be used, as
    while one of them is still the old one, change nothing.

    Args:
        make: makes a channel with credentials, or with None in plain text.
        tls: None for plain text.

    Raises:
        InvalidArgument: see ``Tls.credentials``.
    """

    def __init__(self, make: Callable[[grpc.ChannelCredentials | None], C], tls: Tls | None):
        self._make = make
        self._tls = tls
        self._lock = threading.Lock()
        self._stamp = tls.stamp() if tls is not None else ()
        self._channel: C = make(tls.credentials() if tls is not None else None)
        self._stub = _stub(self._channel)
        self._old: deque[C] = deque(maxlen=OLD_CHANNELS)

    @property
    def stub(self) -> Any:
        """The stub for a call that begins now."""
        if self._tls is not None:
            with self._lock:
                stamp = self._tls.stamp()
                if stamp != self._stamp:
                    self._stamp = stamp
                    self._renew(self._tls)
        return self._stub

    def _renew(self, tls: Tls) -> None:
        try:
            channel = self._make(tls.credentials())
        except InvalidArgument:
            return
        self._old.append(self._channel)
        self._channel, self._stub = channel, _stub(channel)

    def channels(self) -> list[C]:
        """All channels, to be closed."""
        return [*self._old, self._channel]


def _stub(channel: Any) -> Any:
    return generation_pb2_grpc.GenerationServiceStub(channel)
