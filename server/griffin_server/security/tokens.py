"""JSON Web Tokens (RFC 7519), signed by keys of a JSON Web Key Set (RFC 7517)."""

from __future__ import annotations

import asyncio
import json
import math
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jwt
import structlog

from griffin_server.access_settings import CALLER, CALLER_ALLOWED
from griffin_server.security.errors import BadSecurityFile, Unauthenticated
from griffin_server.security.files import WatchedFiles
from griffin_server.security.principal import Principal

ALGORITHMS = (
    *("RS256", "RS384", "RS512", "PS256", "PS384", "PS512"),
    *("ES256", "ES384", "ES512", "EdDSA"),
)
"""The signatures that are accepted: those whose keys may be public."""

FRESH_S, LEAST_INTERVAL_S, FETCH_S = 300.0, 10.0, 5.0
"""For keys from a URL: how old they may be, the least seconds between two fetches that unknown keys
cause, and the time-out of a fetch."""

log = structlog.get_logger("griffin.security")

Keys = Mapping[str | None, jwt.PyJWK]


class KeyFile:
    """The keys of a file.

    Raises:
        BadSecurityFile: the file is no key set.
    """

    def __init__(self, path: Path) -> None:
        self._keys = WatchedFiles("jwt_keys", (path,), lambda: _keys(json.loads(path.read_text())))

    async def find(self, key_id: str | None) -> jwt.PyJWK | None:
        return self._keys.value.get(key_id)


class KeyUrl:
    """The keys behind a URL, fetched when one is first asked for and then now and again. While they
    cannot be fetched, those of the last time hold.

    Keys that are known are found at once, and those that are old are fetched behind the back of the
    call. Only a call with an unknown key waits, and if it ends the fetch goes on.
    """

    def __init__(self, url: str) -> None:
        self._client = jwt.PyJWKClient(url, cache_jwk_set=False, timeout=FETCH_S)
        self._url = url
        self._keys: Keys = {}
        self._asked: float | None = None
        self._fetch: asyncio.Task[None] | None = None

    async def find(self, key_id: str | None) -> jwt.PyJWK | None:
        known = key_id in self._keys
        age_s = math.inf if self._asked is None else time.monotonic() - self._asked
        if self._fetch is None and age_s >= (FRESH_S if known else LEAST_INTERVAL_S):
            self._asked = time.monotonic()
            self._fetch = asyncio.create_task(self._fetched())
        if not known and self._fetch is not None:
            await asyncio.shield(self._fetch)
        return self._keys.get(key_id)

    async def _fetched(self) -> None:
        try:
            async with asyncio.timeout(2 * FETCH_S):  # FETCH_S holds for each read
                self._keys = _keys(await asyncio.to_thread(self._client.fetch_data))
        except (jwt.PyJWTError, ValueError, TimeoutError) as error:
            log.error(str(BadSecurityFile("jwt_keys", self._url, error)))
        finally:
            self._fetch = None


class Tokens:
    """Tokens of one issuer for one audience.

    Args:
        keys: the URL (https:// or http://) or the path of the key set.
        issuer, audience: what the claims ``iss`` and ``aud`` must say.
        leeway_s: seconds by which clocks may differ.

    Raises:
        BadSecurityFile: the file is no key set.
    """

    def __init__(self, keys: str, *, issuer: str, audience: str, leeway_s: float) -> None:
        is_url = keys.startswith(("https://", "http://"))
        self._keys = KeyUrl(keys) if is_url else KeyFile(Path(keys))
        self._issuer = issuer
        self._audience = audience
        self._leeway_s = leeway_s

    async def principal(self, token: str) -> Principal:
        """Whose token it is: the claim ``sub``, with the groups of the claim ``groups``.

        Raises:
            Unauthenticated: the token does not hold.
        """
        try:
            key = await self._keys.find(jwt.get_unverified_header(token).get("kid"))
            if key is None:
                raise Unauthenticated("authorization: the token is signed by an unknown key")
            claims: dict[str, Any] = jwt.decode(
                token,
                key,
                algorithms=[name for name in ALGORITHMS if name == key.algorithm_name],
                audience=self._audience,
                issuer=self._issuer,
                leeway=self._leeway_s,
                options={"require": ["exp", "iss", "aud", "sub"]},
            )
        except jwt.PyJWTError as error:
            raise Unauthenticated(f"authorization: the token does not hold ({error})") from None
        if not CALLER.fullmatch(claims["sub"]):
            raise Unauthenticated(f"authorization: the token's sub must have {CALLER_ALLOWED}")
        groups = claims.get("groups", [])
        if not isinstance(groups, list):
            raise Unauthenticated("authorization: the token's groups must be a list")
        return Principal(name=claims["sub"], groups=frozenset(map(str, groups)))


def _keys(described: object) -> Keys:
    """A key set's keys by their id; a key without one is found by tokens without one.

    Raises:
        ValueError: it is no key set, or has a key that is secret.
    """
    if not isinstance(described, dict):
        raise ValueError("it is no JSON Web Key Set")
    try:
        keys = jwt.PyJWKSet.from_dict(described).keys
    except jwt.PyJWTError as error:
        raise ValueError(str(error)) from error
    if any(key.key_type == "oct" for key in keys):
        raise ValueError("keys of type oct are secrets, and no key of a token may be one")
    return {key.key_id: key for key in keys}
