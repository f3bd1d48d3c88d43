"""The Python SDK of Griffin: needs grpcio and protobuf only.

from griffin_client import GriffinClient

with GriffinClient("localhost:50051") as client:
    for event in client.generate("Once upon a time", density=0.5):
        ...
"""

from griffin_client.aio import AsyncGriffinClient
from griffin_client.client import GriffinClient
from griffin_client.errors import (
    Aborted,
    Cancelled,
    DeadlineExceeded,
    FailedPrecondition,
    GriffinClientError,
    InvalidArgument,
    NotFound,
    ResourceExhausted,
    ServerFault,
    Unavailable,
)
from griffin_client.types import (
    Analysis,
    Completion,
    Event,
    Finished,
    LayerAnalysis,
    Message,
    ModelInfo,
    PruningFigures,
    Sampling,
    Score,
    ScoreMode,
    Session,
    Sharing,
    Started,
    Stopping,
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
    "AsyncGriffinClient",
    "Cancelled",
    "Completion",
    "DeadlineExceeded",
    "Event",
    "FailedPrecondition",
    "Finished",
    "GriffinClient",
    "GriffinClientError",
    "InvalidArgument",
    "LayerAnalysis",
    "Message",
    "ModelInfo",
    "NotFound",
    "PruningFigures",
    "ResourceExhausted",
    "Sampling",
    "Score",
    "ScoreMode",
    "ServerFault",
    "Session",
    "Sharing",
    "Started",
    "Stopping",
    "Timings",
    "TokenLogprob",
    "TokenScore",
    "Tokens",
    "TopLogprob",
    "Unavailable",
    "Usage",
]
