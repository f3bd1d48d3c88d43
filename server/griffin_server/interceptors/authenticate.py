"""Asks who makes a call before its request is parsed."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from griffin_server.interceptors.call import Call
from griffin_server.security.identity import Identity
from griffin_server.security.principal import principal_var


class Authentication:
    """Finds out the principal of each call.

    Args:
        identity: says who it is.
    """

    def __init__(self, identity: Identity) -> None:
        self._identity = identity

    @asynccontextmanager
    async def authenticate(self, call: Call) -> AsyncIterator[None]:
        """Notes who makes a call, for the method and for the log.

        Raises:
            Unauthenticated: the call does not say so, or what it says does not hold.
            PermissionDenied: the caller may not use the service.
        """
        call.principal = await self._identity.principal(call.context)
        principal_var.set(call.principal)
        yield
