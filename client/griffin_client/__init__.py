"""The Python SDK of Griffin: a client for asyncio and one without. It needs grpcio, protobuf and
googleapis-common-protos only.

    from griffin_client import GriffinClient

    with GriffinClient("localhost:50051") as client:
        for text in client.stream_text("Once upon a time", max_tokens=64, density=0.5):
            print(text, end="", flush=True)
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from griffin_client.aio import AsyncGriffinClient
from griffin_client.channel import Tls
from griffin_client.choices import Policy, ScoreMode, Sharing, Speculation, Verify
from griffin_client.client import GriffinClient
from griffin_client.errors import (
    Aborted,
    Cancelled,
    DeadlineExceeded,
    FailedPrecondition,
    GriffinClientError,
    InvalidArgument,
    NotFound,
    PermissionDenied,
    ResourceExhausted,
    ServerFault,
    Unauthenticated,
    Unavailable,
)
from griffin_client.figures import PruningFigures, SpeculationFigures
from griffin_client.options import AnalyzeOptions, GenerateOptions, ScoreOptions
from griffin_client.types import (
    Analysis,
    Completion,
    Event,
    Finished,
    LayerAnalysis,
    Message,
    ModelInfo,
    SamplingDefaults,
    Score,
    Session,
    Started,
    Timings,
    TokenLogprob,
    Tokens,
    TokenScore,
    TopLogprob,
    Usage,
)

__all__ = [
    "Aborted",
    "Analysis",
    "AnalyzeOptions",
    "AsyncGriffinClient",
    "Cancelled",
    "Completion",
    "DeadlineExceeded",
    "Event",
    "FailedPrecondition",
    "Finished",
    "GenerateOptions",
    "GriffinClient",
    "GriffinClientError",
    "InvalidArgument",
    "LayerAnalysis",
    "Message",
    "ModelInfo",
    "NotFound",
    "PermissionDenied",
    "Policy",
    "PruningFigures",
    "ResourceExhausted",
    "SamplingDefaults",
    "Score",
    "ScoreMode",
    "ScoreOptions",
    "ServerFault",
    "Session",
    "Sharing",
    "Speculation",
    "SpeculationFigures",
    "Started",
    "Timings",
    "Tls",
    "TokenLogprob",
    "TokenScore",
    "Tokens",
    "TopLogprob",
    "Unauthenticated",
    "Unavailable",
    "Usage",
    "Verify",
    "__version__",
]

if TYPE_CHECKING:
    __version__: str


def __getattr__(name: str) -> str:
    """Reads ``__version__`` when it is asked for: importlib.metadata takes time to import."""
    if name == "__version__":
        from importlib.metadata import version  # noqa: PLC0415

        return version("griffin-serving")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
