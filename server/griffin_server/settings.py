"""The settings of a server: each is a flag, an environment variable and a line of a TOML file."""

from __future__ import annotations

import argparse
import os
import tomllib
from collections.abc import Sequence
from contextvars import ContextVar
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator
from pydantic_settings import (
    BaseSettings,
    CliApp,
    EnvSettingsSource,
    NoDecode,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
    TomlConfigSettingsSource,
)

from griffin_server.access_settings import AccessSettings, split_commas
from griffin_server.address import Address, UnixAddress, check_target, parse_host
from griffin_server.environment import is_service_link

HandoffTransports = Literal["auto", "shared_memory", "messages"]
"""The transports of KV that a decode server offers to its prefill servers."""

LogFormat = Literal["auto", "json", "console"]

_CALLERS, _PEERS = "one of api_keys, jwt_keys and tls_client_ca", "tls_client_ca"

_config_file: ContextVar[Path | None] = ContextVar("config_file", default=None)


class Settings(AccessSettings):
    """Serve a model.

    Each flag can also be set as GRIFFIN_<NAME> in the environment or as <name> in the TOML file of
    --config; a flag wins over the environment, the environment over the file.
    """

    model_config = SettingsConfigDict(
        env_prefix="GRIFFIN_",
        extra="forbid",
        allow_inf_nan=False,
        frozen=True,
        cli_prog_name="griffin serve",
        cli_kebab_case=True,
        cli_implicit_flags=True,
        cli_avoid_json=True,
        cli_hide_none_type=True,
    )

    config: Path | None = Field(None, description="TOML file with settings.")
    role: Literal["all", "prefill", "decode"] = Field(
        "all",
        description="all: this process runs both phases; prefill or decode: only that phase.",
    )
    host: str = Field(
        "127.0.0.1",
        description="Address to listen on: a name, an IPv4 or IPv6 address, 0.0.0.0 or :: for all "
        "addresses, or unix:PATH for a Unix socket, which its owner and group may use.",
    )
    port: int = Field(
        50051,
        ge=0,
        le=65535,
        description="Port to listen on; 0 takes a free one. A Unix socket ignores it.",
    )
    prefill_host: str | None = Field(
        None,
        description="In role all, an address, as host, at which to serve PrefillService as well, "
        "for decode servers; by default it is not served.",
    )
    prefill_port: int = Field(
        50052, ge=0, le=65535, description="Port of prefill_host; 0 takes a free one."
    )
    prefill_target: Annotated[tuple[str, ...], NoDecode] = Field(
        (),
        description="A prefill server: host:port, [IPv6]:port, unix:PATH, or a gRPC name such as "
        "dns:///prefill:50052. Repeat it, or separate several with commas. Role decode needs it; "
        "other roles refuse it.",
    )
    stuck_after_s: float = Field(
        30.0,
        gt=0,
        description="Seconds after which a step, or a pass over prompts, that has also taken ten "
        "times as long as any before it makes the server report NOT_SERVING, and neither live nor "
        "ready. Raise it if one pass of your model takes that long.",
    )
    handoff_timeout_s: float = Field(
        120.0,
        gt=0,
        description="Seconds that a prefill server may send nothing before its prompt is given to "
        "another one. It must be longer than a prompt waits there, and than a pass takes.",
    )
    local_prefill_max_tokens: int = Field(
        32,
        ge=0,
        description="In role decode, prompts of up to this many tokens are not sent to a prefill "
        "server.",
    )
    own_prefill_tokens: int | None = Field(
        None,
        ge=0,
        description="The old name of local_prefill_max_tokens. It works until the next release.",
    )
    handoff: HandoffTransports = Field(
        "auto",
        description="How KV is transferred from a prefill server. auto: on one host through GPU "
        "memory or shared memory, else in messages; shared_memory: as auto, but never through GPU "
        "memory; messages: only in messages.",
    )
    handoff_dir: Path | None = Field(
        None,
        description="Directory of the Unix sockets through which decode servers give prefill "
        "servers of this host shared memory. Both need the same one, of one user, with mode 0700; "
        "it is made if it does not exist. By default griffin-UID in the directory for temporary "
        "files.",
    )
    stream_interval: int = Field(
        0,
        ge=0,
        description="Tokens in a message after the first one. More tokens save CPU time but arrive "
        "later; 0 is 1 for up to 4 streams, and up to 4 for more streams while no prompt runs.",
    )
    max_request_bytes: int | None = Field(
        None,
        ge=1024,
        le=(1 << 31) - 1,
        description="Bytes of the largest request message, at most 2 GiB; by default 8 for each "
        "token of the model's context, and at least 256 KiB.",
    )
    metrics_port: int = Field(
        0,
        ge=0,
        le=65535,
        description="HTTP port of /metrics, /livez and /readyz, with TLS if tls_cert is set; 0 "
        "disables them.",
    )
    health_port: int = Field(
        0,
        ge=0,
        le=65535,
        description="HTTP port of /livez and /readyz alone, without TLS, for probes; 0 disables "
        "it.",
    )
    metrics_host: str | None = Field(
        None,
        description="Address of both ports, as host but not a Unix socket; by default the same as "
        "host, or localhost if that is a Unix socket.",
    )
    max_call_s: float = Field(
        3600.0,
        gt=0,
        le=86400,
        description="Seconds after which a call ends with DEADLINE_EXCEEDED, also without a "
        "deadline of its client. Connections are closed after as long, once their calls have "
        "ended, and clients open new ones.",
    )
    shutdown_grace_s: float = Field(
        30.0, ge=0, description="Seconds that running calls may continue after SIGTERM."
    )
    log_level: Literal["debug", "info", "warning", "error"] = Field(
        "info", description="The lowest level that is logged."
    )
    log_format: LogFormat = Field(
        "auto", description="Form of the logs; auto is console on a terminal, else json."
    )

    @model_validator(mode="before")
    @classmethod
    def _accept_old_names(cls, values: dict[str, Any]) -> dict[str, Any]:
        if (old := values.get("own_prefill_tokens")) is not None:
            return {"local_prefill_max_tokens": old, **values}
        return values

    @field_validator("prefill_target", mode="before")
    @classmethod
    def _split_targets(cls, value: Any) -> Any:
        return split_commas(value)

    @field_validator("host", "prefill_host")
    @classmethod
    def _is_an_address(cls, value: str | None) -> str | None:
        if value is not None:
            parse_host(value, 0)
        return value

    @field_validator("metrics_host")
    @classmethod
    def _is_a_host(cls, value: str | None) -> str | None:
        if value is not None and isinstance(parse_host(value, 0), UnixAddress):
            raise ValueError("allowed: a name or an IP address, and no Unix socket")
        return value

    @field_validator("prefill_target")
    @classmethod
    def _are_targets(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(check_target(target) for target in value)

    @property
    def address(self) -> Address:
        """The address of the role's service; that of GenerationService in role all."""
        return parse_host(self.host, self.port)

    @property
    def prefill_address(self) -> Address | None:
        """The address of PrefillService: in role all as asked, in role prefill the only one."""
        if self.role == "prefill":
            return self.address
        return parse_host(self.prefill_host, self.prefill_port) if self.prefill_host else None

    @model_validator(mode="after")
    def _local_or_secure(self) -> Settings:
        if self.role != "prefill":
            self._check_address("host", self.address, self.asks_who_calls, _CALLERS)
        if self.prefill_address is not None:
            name = "host" if self.role == "prefill" else "prefill_host"
            self._check_address(name, self.prefill_address, self.tls_client_ca, _PEERS)
            if self.tls_client_ca is not None and not self.prefill_peers:
                raise ValueError("prefill_peers: got none; allowed: at least one decode server")
        if self.role == "prefill" and (self.api_keys or self.jwt_keys):
            raise ValueError(
                "api_keys, jwt_keys: got a file with role prefill, whose callers have certificates"
            )
        if self.role != "all" and self.prefill_host is not None:
            raise ValueError(f"prefill_host: got {self.prefill_host!r} with role {self.role!r}")
        return self

    def _check_address(self, name: str, address: Address, asks: object, how: str) -> None:
        """Refuses an address that others can reach and where nobody is asked who they are."""
        if isinstance(address, UnixAddress):
            if self.tls_cert is not None and not (self.prefill_host or self.metrics_port):
                raise ValueError("tls_cert: got a file with a Unix socket, which needs no TLS")
        elif not (self.insecure or address.is_loopback or (self.tls_cert and asks)):
            raise ValueError(
                f"{name}: got {address.host!r}, which others can reach, without "
                f"{'TLS' if self.tls_cert is None else 'asking who calls'}; allowed: with "
                f"tls_cert, tls_key and {how}, or with --insecure"
            )

    @model_validator(mode="after")
    def _target_if_decode(self) -> Settings:
        if (self.role == "decode") != bool(self.prefill_target):
            given = ", ".join(self.prefill_target) or None
            raise ValueError(
                f"prefill_target: got {given!r} with role {self.role!r}; role decode needs one, "
                "the other roles take none"
            )
        return self

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        assert isinstance(env_settings, EnvSettingsSource)
        env_settings.env_vars = {
            name: value
            for name, value in env_settings.env_vars.items()
            # Shells and manifests write "" for "not set".
            if value and not is_service_link(name, value)
        }
        sources: list[PydanticBaseSettingsSource] = [init_settings, env_settings]
        if path := _config_file.get():
            sources.append(TomlConfigSettingsSource(settings_cls, path))
        return tuple(sources)


def load_settings(arguments: Sequence[str]) -> Settings:
    """Reads the settings from flags, environment and the TOML file that one of them may name.

    Raises:
        pydantic.ValidationError: a value is out of range, or a name is unknown.
        OSError, tomllib.TOMLDecodeError: the file cannot be read.
    """
    finder = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    finder.add_argument("--config", default=os.environ.get("GRIFFIN_CONFIG") or None)
    path = finder.parse_known_args(arguments)[0].config
    if path is not None:
        with Path(path).open("rb") as file:
            tomllib.load(file)  # pydantic takes a missing or broken file for an empty one
    token = _config_file.set(Path(path) if path else None)
    try:
        return CliApp.run(Settings, cli_args=list(arguments))
    finally:
        _config_file.reset(token)


def describe(error: Any) -> str:
    """A ValidationError as text, with a line for each setting: its name, its value, and what is
    allowed."""
    lines = []
    for item in error.errors():
        name = ".".join(str(part) for part in item["loc"])
        message = item["msg"].removeprefix("Value error, ")
        lines.append(f"{name}: got {item['input']!r}; {message}" if name else message)
    return "\n".join(lines)
