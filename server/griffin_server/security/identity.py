"""Who makes a call, and which services they may use."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

import grpc

from griffin_server.security.api_keys import PREFIX, ApiKeys
from griffin_server.security.errors import PermissionDenied, Unauthenticated
from griffin_server.security.principal import LOCAL, OPERATOR, Principal
from griffin_server.security.tokens import Tokens
from griffin_server.settings import CALLER, CALLER_ALLOWED, Settings

PREFILL_METHODS = "/griffin.v1.PrefillService/"

SCHEME = "Bearer "

SAN = "x509_subject_alternative_name"
"""gRPC's name for it."""


class Identity:
    """Says who makes a call. Where the settings name no source of identity, everybody is ``LOCAL``.

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
        self._peers = frozenset(settings.prefill_peers)

    async def principal(self, context: grpc.aio.ServicerContext[Any, Any]) -> Principal:
        """Who makes a call.

        Raises:
            Unauthenticated: the call does not say so, or what it says does not hold.
        """
        if self._keys or self._tokens:
            found = await self._of_secret(_bearer(context.invocation_metadata() or ()))
        elif self._certificates:
            found = _of_certificate(context.auth_context())
        else:
            return LOCAL
        if found.name in self._operators:
            return replace(found, groups=found.groups | {OPERATOR})
        return found

    def check(self, principal: Principal, method: str) -> None:
        """Checks that a caller may use a method.

        Raises:
            PermissionDenied: it is one of PrefillService, and the caller is no peer.
        """
        is_peer = principal is LOCAL or principal.name in self._peers
        if method.startswith(PREFILL_METHODS) and not is_peer:
            raise PermissionDenied(
                f"PrefillService: got {principal.name!r}; allowed: the decode servers that "
                "--prefill-peers names"
            )

    async def _of_secret(self, secret: str) -> Principal:
        if self._keys is not None and (self._tokens is None or secret.startswith(PREFIX)):
            found = self._keys.principal(secret)
            if found is None:
                raise Unauthenticated("authorization: the key is unknown")
            return found
        assert self._tokens is not None
        return await self._tokens.principal(secret)


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
