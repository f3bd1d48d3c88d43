"""The settings of a server's model and engine."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, field_validator, model_validator
from pydantic_settings import BaseSettings

from griffin_core.spec.choices import (
    DEFAULT_MODEL,
    MAX_WARMUP,
    CorrectionKind,
    PolicyName,
    Sharing,
    SpeculationMode,
)

SamplingDefaultsFrom = Literal["greedy", "model"]
"""The source of the sampling fields that a request does not set."""


class EngineSettings(BaseSettings):
    """What runs, on what, and within which bounds. ``Settings`` adds how it is reached."""

    model: str = Field(
        DEFAULT_MODEL,
        description="The model: a directory, a .gguf file, a hub id, or the packaged default.",
    )
    allow_pickle: bool = Field(
        False,
        description="Accept weights in pytorch_model.bin. It is a pickle, which is a program: "
        "allow it only where you trust its author. Safetensors and GGUF files need no trust.",
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
    agreement_floor: float | None = Field(
        None,
        gt=0,
        lt=1,
        description="Let the density of requests that set neither density nor floor follow the "
        "agreement with the dense model that checks measure, so that it stays above this; takes "
        "the place of density.",
    )
    policy: PolicyName | None = Field(
        None,
        description="Selection policy, for requests that do not set it; by default the one that "
        "the model's calibration found best, and topk without a calibration.",
    )
    correction: CorrectionKind | None = Field(
        None,
        description="What is added to the output of the experts, for requests that do not set it: "
        "none, bias (the mean output of the other neurons) or residual (a linear map as well); by "
        "default the one that the model's calibration found best, and bias without a calibration.",
    )
    correction_rank: int | None = Field(
        None,
        ge=1,
        le=256,
        description="Rank of a residual, for requests that do not set it; on a GPU the highest "
        "rank that a request may set.",
    )
    warmup_tokens: int = Field(
        0,
        ge=0,
        le=MAX_WARMUP,
        description="Sessions run dense until so many tokens of prompt and completion have run, "
        "and all of these choose the experts, for requests that do not set it. 48 halves the harm "
        "to completions of short prompts; 0 is the paper's way.",
    )
    speculation: SpeculationMode = Field(
        "off",
        description="What drafts tokens that the model then verifies together, for requests that "
        "do not set it. lookup: what followed the last tokens where they stood before; slim: the "
        "model on a request's experts, verified dense; auto: both, while they pay. Completions "
        "stay the same but for rounding.",
    )
    calibration: str | None = Field(
        None,
        description="The file that griffin calibrate wrote for the model; by default the one in "
        "the cache or the packaged one, if there is one. none uses no calibration.",
    )
    sharing: Sharing = Field(
        "auto",
        description="Which experts a session runs on, for requests that do not set it. auto: the "
        "fastest choice, and dense unless pruning saves 5 % of a step's time; private: a set of "
        "experts for each session; shared: one set for all sessions with the same density and "
        "policy.",
    )
    share_across_owners: bool = Field(
        False,
        description="Sessions of different callers may run on one expert set and find each other's "
        "slim views. It saves memory and time, and lets a caller find out by timing whether "
        "another has sent a certain prompt.",
    )
    control_tokens_in_content: bool = Field(
        False,
        description="In a chat, the text of a control token, such as <|im_end|>, becomes that "
        "token, so that whoever writes a message can end its turn and write the next one. Without "
        "it the text stays text.",
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
    max_caller_sessions: int | None = Field(
        None,
        ge=1,
        description="Of these, those of one caller; by default three quarters where callers are "
        "asked who they are, so that there is room for others.",
    )
    max_caller_memory: float | None = Field(
        None,
        gt=0,
        le=1,
        description="Fraction of the sessions' memory that one caller's running sessions may "
        "reserve; its further ones wait.",
    )
    max_caller_queue: int | None = Field(
        None, ge=0, description="The most requests of one caller that wait; further are refused."
    )
    max_caller_tokens: int | None = Field(
        None,
        ge=1,
        description="Tokens a minute, of prompts and completions, above which a caller's requests "
        "are refused.",
    )
    limits_storage: str = Field(
        "async+memory://",
        description="Where callers' tokens are counted: async+memory:// for this server alone, or "
        "async+redis://HOST:PORT (with TLS async+rediss://) for several servers together.",
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

    @field_validator("limits_storage")
    @classmethod
    def _is_a_storage(cls, value: str) -> str:
        if value != cls.model_fields["limits_storage"].default:
            from griffin_server.rpc.token_rate import storage_of  # noqa: PLC0415  # few need it

            storage_of(value)
        return value

    @model_validator(mode="after")
    def _speculation_varies_rows(self) -> EngineSettings:
        if self.batch_invariant and self.speculation != "off":
            raise ValueError(
                f"speculation: got {self.speculation} with batch_invariant; allowed: off"
            )
        if self.batch_invariant and self.agreement_floor is not None:
            raise ValueError(
                f"agreement_floor: got {self.agreement_floor:g} with batch_invariant; allowed: none"
            )
        return self

    @model_validator(mode="after")
    def _one_size_of_memory(self) -> EngineSettings:
        if self.memory_fraction is not None and self.session_memory_gib is not None:
            raise ValueError(
                f"memory_fraction: got {self.memory_fraction:g} with session_memory_gib "
                f"{self.session_memory_gib:g}; give one of them"
            )
        return self
