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

from griffin_core.spec.choices import DEFAULT_MODEL, PolicyName, Sharing
from griffin_server.address import UnixAddress, check_target, parse_host
from griffin_server.environment import is_service_link

HandoffTransports = Literal["auto", "shared_memory", "messages"]
"""The transports of KV that a decode server offers to its prefill servers."""

LogFormat = Literal["auto", "json", "console"]

SamplingDefaultsFrom = Literal["greedy", "model"]
"""The source of the sampling fields that a request does not set."""

_config_file: ContextVar[Path | None] = ContextVar("config_file", default=None)


class Settings(BaseSettings):
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
    model: str = Field(
        DEFAULT_MODEL,
        description="The model: a directory, a .gguf file, a hub id, or the packaged default.",
    )
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
    prefill_target: Annotated[tuple[str, ...], NoDecode] = Field(
        (),
        description="A prefill server: host:port, [IPv6]:port, unix:PATH, or a gRPC name such as "
        "dns:///prefill:50052. Repeat it, or separate several with commas. Role decode needs it; "
        "other roles refuse it.",
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
    device: str = Field(
        "auto", description="cpu, cuda or cuda:N; auto takes cuda if it is available."
    )
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto",
        description="Type of weights, activations and KV; auto picks the device's fastest type.",
    )
    threads: int = Field(
        0,
        ge=0,
        le=1024,
        description="CPU threads of the model. 0 uses as many CPUs as affinity, quota and other "
        "programs leave, and adapts while the server runs; any other number is fixed.",
    )
    batch_invariant: bool = Field(
        False,
        description="A private session's output does not depend, to the bit, on other sessions. A "
        "step then takes 1.2 to 1.7 times as long as a dense step on a CPU, and on a GPU as long "
        "as one dense step for every eight sessions; pruning saves no time, and sharing auto runs "
        "dense. Without it, float32 on a CPU differs only by rounding, and 16-bit types may give "
        "other tokens.",
    )
    cuda_graphs: bool = Field(
        True,
        description="On a GPU, run each decode step as a CUDA graph, captured at start.",
    )
    density: float = Field(
        1.0,
        gt=0,
        le=1,
        description="Fraction of FF neurons kept, for requests that do not set it. 1 is the dense "
        "model. Set 0.5 or 0.75 for models of 7B parameters or more and for long prompts, and "
        "check the answers: small models on short prompts repeat themselves.",
    )
    policy: PolicyName = Field(
        "topk", description="Selection policy, for requests that do not set it."
    )
    sharing: Sharing = Field(
        "auto",
        description="Which experts a session runs on, for requests that do not set it. auto: the "
        "fastest choice, and dense unless pruning saves 5 % of a step's time; private: a set of "
        "experts for each session; shared: one set for all sessions with the same density and "
        "policy.",
    )
    sampling_defaults: SamplingDefaultsFrom = Field(
        "greedy",
        description="Source of the sampling fields that a request does not set. greedy: the most "
        "likely token, without penalties; model: the model's generation_config.json, and greedy "
        "for fields that it does not set.",
    )
    max_sessions: int = Field(
        64, ge=1, description="The most sessions in prefill or decode at once."
    )
    max_queue: int = Field(
        256, ge=0, description="The most requests that wait; further ones are refused."
    )
    memory_fraction: float | None = Field(
        None,
        gt=0,
        le=1,
        description="Fraction of the memory left free by the model that KV caches and slim views "
        "may use; by default 0.9 on a GPU and 0.5 on a CPU. A GPU's is reserved at "
        "start, so that a second server divides the rest.",
    )
    session_memory_gib: float | None = Field(
        None,
        gt=0,
        description="GiB for KV caches and slim views, in place of memory_fraction; on a GPU the "
        "start fails if less is free.",
    )
    idle_memory_gib: float | None = Field(
        None,
        ge=0,
        description="GiB of that memory that kept sessions may use between their turns; by default "
        "a quarter of it.",
    )
    session_ttl_s: float = Field(
        600.0, ge=0, description="Seconds that a kept session may be idle."
    )
    reader_timeout_s: float = Field(
        60.0, gt=0, description="Seconds after which a call whose client does not read is ended."
    )
    prefill_chunk_tokens: int = Field(
        0,
        ge=0,
        le=32768,
        description="Prompt tokens, from one or several prompts, in a pass between two decode "
        "steps; 0 is 512 on a CPU and 4096 on a GPU.",
    )
    prefill_share: float | None = Field(
        None,
        gt=0,
        le=1,
        description="Fraction of the time given to prompts while sessions decode; 1 means one "
        "decode step between two passes. By default 0.5 on a CPU and 1 on a GPU.",
    )
    stream_interval: int = Field(
        0,
        ge=0,
        description="Tokens in a message after the first one. More tokens save CPU time but arrive "
        "later; 0 is 1 for up to 4 streams, and up to 4 for more streams while no prompt runs.",
    )
    max_request_bytes: int = Field(
        4 << 20,
        ge=1024,
        le=(1 << 31) - 1,
        description="Bytes of the largest request message; protobuf allows no more than 2 GiB.",
    )
    metrics_port: int = Field(
        0,
        ge=0,
        le=65535,
        description="HTTP port of /metrics, /livez and /readyz; 0 disables them.",
    )
    metrics_host: str | None = Field(
        None,
        description="Address of that port, as host but not a Unix socket; by default the same as "
        "host, or localhost if that is a Unix socket.",
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
    def _split_commas(cls, value: Any) -> Any:
        parts = [value] if isinstance(value, str) else value
        return tuple(item.strip() for part in parts for item in part.split(",") if item.strip())

    @field_validator("host")
    @classmethod
    def _is_an_address(cls, value: str) -> str:
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

    @model_validator(mode="after")
    def _one_size_of_memory(self) -> Settings:
        if self.memory_fraction is not None and self.session_memory_gib is not None:
            raise ValueError(
                f"memory_fraction: got {self.memory_fraction:g} with session_memory_gib "
                f"{self.session_memory_gib:g}; give one of them"
            )
        return self

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
