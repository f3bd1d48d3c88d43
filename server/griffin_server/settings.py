"""Settings of a server: each is a flag, an environment variable and a line of a TOML file."""

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

from griffin_core.choices import DEFAULT_MODEL, PolicyName, Sharing
from griffin_server.address import UnixAddress, check_target, parse_host
from griffin_server.environment import is_service_link
from griffin_server.telemetry.logging import LogFormat

HandoffWay = Literal["auto", "shared_memory", "messages"]

SamplingDefaultsFrom = Literal["greedy", "model"]
"""Where the sampling comes from that a request does not set."""

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
        DEFAULT_MODEL, description="A directory, a .gguf file, a hub id, or the packaged default."
    )
    role: Literal["all", "prefill", "decode"] = Field(
        "all", description="all: one process does both phases; prefill, decode: one each."
    )
    host: str = Field(
        "127.0.0.1",
        description="Where to listen: a name, an IPv4 or IPv6 address, 0.0.0.0 or :: for all of "
        "them, or unix:PATH for a Unix socket, which its owner and group may use.",
    )
    port: int = Field(
        50051,
        ge=0,
        le=65535,
        description="Port to listen on; 0 takes a free one. A Unix socket has none.",
    )
    prefill_target: Annotated[tuple[str, ...], NoDecode] = Field(
        (),
        description="A prefill server: host:port, [IPv6]:port, unix:PATH, or a gRPC name such as "
        "dns:///prefill:50052. May be repeated, or list several with commas. Needed by, and "
        "only by, role decode.",
    )
    own_prefill_tokens: int = Field(
        32, ge=0, description="Role decode runs prompts of up to so many tokens itself."
    )
    handoff: HandoffWay = Field(
        "auto",
        description="How KV comes from a prefill server. auto: where both are on one host, from "
        "its GPU's memory or through shared memory, else in messages; shared_memory: not from its "
        "GPU's; messages: in messages alone.",
    )
    device: str = Field("auto", description="cpu, cuda or cuda:N; auto takes cuda if there is one.")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto",
        description="Of weights, activations and KV; auto picks the fastest dtype for the device.",
    )
    threads: int = Field(
        0,
        ge=0,
        le=1024,
        description="CPU threads of the model. 0 is one for each CPU there is to use, by affinity, "
        "quota and what other programs leave, looked at as it runs; a number stays as it is.",
    )
    batch_invariant: bool = Field(
        False,
        description="Private sessions generate the same, to the bit, whoever else is there. A step "
        "takes 1.2 to 1.7 times as long as a dense one on a CPU, and on a GPU as long as a dense "
        "one for every eight sessions; pruning saves no time, and auto is dense. Without it that "
        "holds in float32 on a CPU but for rounding, and in 16 bits tokens may differ.",
    )
    cuda_graphs: bool = Field(
        True, description="On a GPU, run a decode step as one graph, captured at start."
    )
    density: float = Field(
        1.0,
        gt=0,
        le=1,
        description="Fraction of FF neurons kept, for requests that do not set it. 1, the default, "
        "is the dense model. Set 0.5 or 0.75 for models of 7B parameters and more and for long "
        "prompts, and look at the answers: small models on short prompts repeat themselves.",
    )
    policy: PolicyName = Field(
        "topk", description="Selection policy, for requests that do not set it."
    )
    sharing: Sharing = Field(
        "auto",
        description="Default when a request does not set it. auto: the cheapest form, and dense "
        "unless pruning gains 5 % of a step's time; private: a set of experts for each session; "
        "shared: one for all of one density and policy.",
    )
    sampling_defaults: SamplingDefaultsFrom = Field(
        "greedy",
        description="How tokens are drawn, for sampling fields that a request does not set. "
        "greedy: the likeliest token, no penalties; model: as the model's own "
        "generation_config.json says, and greedy where it says nothing.",
    )
    max_sessions: int = Field(64, ge=1, description="Sessions in prefill or decode at once.")
    max_queue: int = Field(256, ge=0, description="Requests that may wait; more are refused.")
    memory_fraction: float | None = Field(
        None,
        gt=0,
        le=1,
        description="Share of the memory that is free once the model is loaded, for KV caches and "
        "slim views of all sessions: 0.9 on a GPU and 0.5 on a CPU if not given. On a GPU it is "
        "taken at once, so that a second server divides what is left.",
    )
    session_memory_gib: float | None = Field(
        None,
        gt=0,
        description="GiB for them, in place of memory_fraction; on a GPU refused if less is free.",
    )
    idle_memory_gib: float | None = Field(
        None,
        ge=0,
        description="GiB of it that kept sessions may hold between their turns; a quarter of it "
        "if not given.",
    )
    session_ttl_s: float = Field(600.0, ge=0, description="How long a kept session may be idle.")
    reader_timeout_s: float = Field(
        60.0, gt=0, description="How long a call's work waits for a client that does not read."
    )
    prefill_chunk_tokens: int = Field(
        0,
        ge=0,
        le=32768,
        description="Prompt tokens, of one prompt or several, that run at once between two decode "
        "steps; 0 is 512 on a CPU and 4096 on a GPU.",
    )
    prefill_share: float | None = Field(
        None,
        gt=0,
        le=1,
        description="Share of the time that prompts get while sessions decode; 1 is one decode "
        "step between two passes over prompts. 0.5 on a CPU and 1 on a GPU if not given.",
    )
    stream_interval: int = Field(
        0,
        ge=0,
        description="Tokens a message after the first one. More save CPU time, and come later; "
        "0 is 1 for up to 4 streams, and up to 4 for more of them while no prompt is read.",
    )
    max_request_bytes: int = Field(
        4 << 20,
        ge=1024,
        le=(1 << 31) - 1,
        description="Largest request message; a protobuf message has no more than 2 GiB.",
    )
    metrics_port: int = Field(
        0,
        ge=0,
        le=65535,
        description="Port of /metrics, /livez and /readyz over HTTP; 0 for none of them.",
    )
    metrics_host: str | None = Field(
        None,
        description="Where that port is, as host has it and not a Unix socket; if not given, host, "
        "and localhost where that is a Unix socket.",
    )
    shutdown_grace_s: float = Field(
        30.0, ge=0, description="How long running calls may go on after SIGTERM."
    )
    log_level: Literal["debug", "info", "warning", "error"] = Field("info")
    log_format: LogFormat = Field("auto", description="auto: console on a terminal, else json.")

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
            raise ValueError("allowed: a name or an IP address; HTTP has no Unix socket here")
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
            # "" is how shells and manifests write "not set".
            if value and not is_service_link(name, value)
        }
        sources: list[PydanticBaseSettingsSource] = [init_settings, env_settings]
        if path := _config_file.get():
            sources.append(TomlConfigSettingsSource(settings_cls, path))
        return tuple(sources)


def load_settings(arguments: Sequence[str]) -> Settings:
    """Settings from flags, environment and the TOML file either of them names.

    Raises:
        pydantic.ValidationError: a value is out of range, or a name is unknown.
        OSError, tomllib.TOMLDecodeError: the file cannot be read.
    """
    finder = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    finder.add_argument("--config", default=os.environ.get("GRIFFIN_CONFIG") or None)
    path = finder.parse_known_args(arguments)[0].config
    if path is not None:
        with Path(path).open("rb") as file:
            tomllib.load(file)  # a missing or broken file must not pass for an empty one
    token = _config_file.set(Path(path) if path else None)
    try:
        return CliApp.run(Settings, cli_args=list(arguments))
    finally:
        _config_file.reset(token)


def describe(error: Any) -> str:
    """A ValidationError in one line for each setting: name, what was given, what is allowed."""
    lines = []
    for item in error.errors():
        name = ".".join(str(part) for part in item["loc"])
        message = item["msg"].removeprefix("Value error, ")
        lines.append(f"{name}: got {item['input']!r}; {message}" if name else message)
    return "\n".join(lines)
