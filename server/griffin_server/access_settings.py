"""The settings of who may call a server, and of how connections are encrypted."""

from __future__ import annotations

import re
from typing import Annotated, Any

from pydantic import Field, FilePath, field_validator, model_validator
from pydantic_settings import NoDecode

from griffin_server.engine_settings import EngineSettings

CALLER = re.compile(r"[\w.@:/+-]{1,128}", re.ASCII)
CALLER_ALLOWED = "1 to 128 letters, digits and . _ @ : / + -"
"""The names of callers."""


def split_commas(value: Any) -> Any:
    """The parts of texts that commas separate."""
    parts = [value] if isinstance(value, str) else value
    return tuple(item.strip() for part in parts for item in part.split(",") if item.strip())


class AccessSettings(EngineSettings):
    """Who may call, and the files that say so. ``Settings`` adds the addresses."""

    insecure: bool = Field(
        False,
        description="Listen beyond this machine without TLS or without asking who calls: whoever "
        "reaches the port may then read and end every session.",
    )
    tls_cert: FilePath | None = Field(
        None,
        description="PEM file with the server's certificate chain. It is read again when it "
        "changes, as are tls_key, tls_client_ca, api_keys and the file of jwt_keys.",
    )
    tls_key: FilePath | None = Field(None, description="PEM file with the key of tls_cert.")
    tls_client_ca: FilePath | None = Field(
        None,
        description="PEM file with the CA of clients' certificates. Only clients with such a "
        "certificate are let in; its first subject alternative name is the caller's name.",
    )
    api_keys: FilePath | None = Field(
        None,
        description="File with the names of callers and the hashes of their keys; `griffin key` "
        "makes its lines. Callers send their key as 'authorization: Bearer KEY'.",
    )
    jwt_keys: str | None = Field(
        None,
        description="JSON Web Key Set, a file or a URL, whose keys sign callers' tokens. The claim "
        "sub is the caller's name, the claim groups its groups.",
    )
    jwt_issuer: str | None = Field(None, description="The iss that tokens must have.")
    jwt_audience: str | None = Field(None, description="The aud that tokens must have.")
    jwt_leeway_s: float = Field(
        30.0, ge=0, le=600, description="Seconds by which a token's times may be off."
    )
    operators: Annotated[tuple[str, ...], NoDecode] = Field(
        (),
        description="Names of callers that see and close everybody's sessions, besides those in "
        "the group operator.",
    )
    prefill_peers: Annotated[tuple[str, ...], NoDecode] = Field(
        (),
        description="Names, in their certificates, of the decode servers that may use this "
        "server's PrefillService.",
    )
    metrics_client_ca: FilePath | None = Field(
        None,
        description="PEM file with the CA of scrapers' certificates. Only clients with such a "
        "certificate may read the metrics port, which has TLS wherever tls_cert is set.",
    )
    prefill_ca: FilePath | None = Field(
        None,
        description="PEM file with the CA of the prefill servers' certificates. With it or "
        "prefill_cert, connections to them use TLS.",
    )
    prefill_cert: FilePath | None = Field(
        None, description="PEM file with this server's certificate for prefill servers."
    )
    prefill_key: FilePath | None = Field(None, description="PEM file with the key of prefill_cert.")

    @field_validator("operators", "prefill_peers", mode="before")
    @classmethod
    def _split_names(cls, value: Any) -> Any:
        return split_commas(value)

    @field_validator("operators", "prefill_peers")
    @classmethod
    def _are_callers(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        if not all(map(CALLER.fullmatch, value)):
            raise ValueError(f"allowed: names of callers, {CALLER_ALLOWED}")
        return value

    @model_validator(mode="after")
    def _whole_security(self) -> AccessSettings:
        for one, other in (
            ("tls_cert", "tls_key"),
            ("prefill_cert", "prefill_key"),
            ("jwt_keys", "jwt_issuer"),
            ("jwt_keys", "jwt_audience"),
        ):
            first, second = getattr(self, one), getattr(self, other)
            if (first is None) != (second is None):
                raise ValueError(
                    f"{one}, {other}: got {str(first or None)!r} and {str(second or None)!r}; "
                    "give both or none"
                )
        for name in ("tls_client_ca", "metrics_client_ca"):
            if getattr(self, name) is not None and self.tls_cert is None:
                raise ValueError(f"{name}: got a file without tls_cert; give both")
        return self

    @property
    def asks_who_calls(self) -> bool:
        """Whether callers must say who they are."""
        return bool(self.api_keys or self.jwt_keys or self.tls_client_ca)
