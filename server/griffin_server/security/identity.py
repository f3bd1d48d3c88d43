"""Who makes a call: a client of the public plane, or a decode server of the internal one."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any, Protocol, TypeAlias

import grpc

from griffin_server.access_settings import CALLER, CALLER_ALLOWED
from griffin_server.security.api_keys import PREFIX, ApiKeys
from griffin_server.security.errors import PermissionDenied, Unauthenticated
from griffin_server.security.principal import LOCAL, OPERATOR, Principal
from griffin_server.security.tokens import Tokens
from griffin_server.settings import Settings

Context: TypeAlias = "grpc.aio.ServicerContext[Any, Any]"

SCHEME = "Bearer "

SAN = "x509_subject_alternative_name"
"""gRPC's name for it."""


class Identity(Protocol):
    """Says who makes a call."""

    async def principal(self, context: Context) -> Principal:
        """Who makes a call.

        Raises:
            Unauthenticated: the call does not say so, or what it says does not hold.
            PermissionDenied: its caller may use none of the services.
        """
        ...


class Callers(Identity):
    """Says who makes a call of the public plane. Where the settings name no source of identity,
    everybody is ``LOCAL``.

    With keys or tokens the caller is who its ``authorization`` metadata says, else who its
    certificate says. Where certificates are asked for as well, TLS has checked one before.

    Raises:
        BadSecurityFile: a file of the settings cannot be used.
    """

    def __init__(self, settings: Settings) -> None:
        self._keys = ApiKeys(settings.api_keys) if settings.api_keys else None
        self._tokens = None
        if settings.jwt_keys is not None:
            assert settings.jwt_issuer and settings.jwt_audience, "the settings ask for both"
            self._tokens = Tokens(
                settings.jwt_keys,
                issuer=settings.jwt_issuer,
                audience=settings.jwt_audience,
                leeway_s=settings.jwt_leeway_s,
            )
        self._certificates = settings.tls_client_ca is not None
        self._operators = frozenset(settings.operators)

    async def principal(self, context: Context) -> Principal:
        if self._keys or self._tokens:
            found = await self._of_secret(_bearer(context.invocation_metadata() or ()))
        elif self._certificates:
            found = _of_certificate(context.auth_context())
        else:
            return LOCAL
        if found.name in self._operators:
            return replace(found, groups=found.groups | {OPERATOR})
        return found

    async def _of_secret(self, secret: str) -> Principal:
        if self._keys is not None and (self._tokens is None or secret.startswith(PREFIX)):
            found = self._keys.principal(secret)
            if found is None:
                raise Unauthenticated("authorization: the key is unknown")
            return found
        assert self._tokens is not None
        return await self._tokens.principal(secret)


class Peers(Identity):
    """Says which decode server makes a call of the internal plane: the one that its certificate
    names, if the settings list it. Where no certificates are asked for, it is ``LOCAL``."""

    def __init__(self, settings: Settings) -> None:
        self._certificates = settings.tls_client_ca is not None
        self._peers = frozenset(settings.prefill_peers)

    async def principal(self, context: Context) -> Principal:
        if not self._certificates:
            return LOCAL
        found = _of_certificate(context.auth_context())
        if found.name not in self._peers:
            raise PermissionDenied(
                f"PrefillService: got {found.name!r}; allowed: the decode servers that "
                "--prefill-peers names"
            )
        return found


def _bearer(metadata: Iterable[Any]) -> str:
    """The secret of the ``authorization`` metadata.

    Raises:
        Unauthenticated: there is none.
    """
    for key, value in metadata:
        if key == "authorization":
            scheme, secret = value[: len(SCHEME)], value[len(SCHEME) :].strip()
            if scheme.lower() == SCHEME.lower() and secret:
                return str(secret)
    raise Unauthenticated("authorization: got none; allowed: metadata 'authorization: Bearer KEY'")


def _of_certificate(context: Mapping[str, Iterable[bytes]]) -> Principal:
    """The first of a certificate's subject alternative names.

    Raises:
        Unauthenticated: it has none that could be a name.
    """
    names = [name.decode(errors="replace") for name in context.get(SAN, ())]
    if not names or not CALLER.fullmatch(names[0]):
        raise Unauthenticated(
            f"certificate: got {names[:1]} as subject alternative name; allowed: {CALLER_ALLOWED}"
        )
    return Principal(name=names[0])
