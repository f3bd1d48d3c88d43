"""The interface of a KV transport, and the parts that transports through the host's memory share.

A transport has an exporter, which runs on the prefill server, and an importer, which runs on the
decode server. On a GPU both copy on a stream of their own, in parallel with the model's work.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from typing import ClassVar, Protocol

import torch
from torch import Tensor

from griffin.v1 import prefill_pb2 as pb
from griffin_core.forward.events import (
    LayerKv,
)
from griffin_server.transfer.shape import HandoffShape

Bytes = bytes | bytearray | memoryview

CHUNK_BYTES = 1 << 20
"""The most bytes of KV in one message, unless a single token's KV is larger."""


class MemoryNotShared(Exception):
    """The memory that the prefill server exports cannot be read from this process."""


class KvExporter(Protocol):
    """The prefill server's end of a transport."""

    transport: ClassVar[pb.Transport.ValueType]

    stream: torch.cuda.Stream | None
    """The stream for copies to the host, apart from the model's; None without a GPU."""

    exports_memory: ClassVar[bool]
    """Whether the KV stays in this end's memory, where the importer reads it during the call."""

    def write_proof(self, header: pb.PrefillHeader) -> None:
        """Sets the header's fields by which the importer verifies that it reaches the memory."""
        ...

    def chunks(self, event: LayerKv) -> Iterator[tuple[pb.KvChunk, Bytes]]:
        """The messages for one event, each with the bytes that its checksum covers."""
        ...


class KvImporter(Protocol):
    """The decode server's end of a transport."""

    transport: ClassVar[pb.Transport.ValueType]

    def offer(self, request: pb.PrefillRequest) -> None:
        """Sets the request's fields that offer this transport."""
        ...

    def verify(self, header: pb.PrefillHeader) -> None:
        """Checks the proof in a header that names this transport.

        Raises:
            ValueError: the proof is missing or wrong.
            MemoryNotShared: the exported memory cannot be read from this process.
        """
        ...

    def read(self, chunk: pb.KvChunk) -> tuple[LayerKv, Bytes]:
        """The event of a message, with the bytes that its checksum covers.

        Raises:
            ValueError: the message does not fit the handoff's shape.
            MemoryNotShared: as in ``verify``.
        """
        ...

    def close(self, *, complete: bool) -> None:
        """Releases the memory that the transport uses.

        Args:
            complete: the exporter has finished writing.
        """
        ...


class HostExporter:
    """Copies KV to the host and cuts it into blocks of ``CHUNK_BYTES``."""

    exports_memory: ClassVar[bool] = False

    def __init__(self, shape: HandoffShape, device: torch.device) -> None:
        self._block_tokens = max(1, CHUNK_BYTES // shape.token_bytes)
        self.stream = copy_stream(device)

    def _blocks(self, event: LayerKv) -> Iterator[tuple[pb.KvChunk, Tensor]]:
        """Messages that do not have their KV yet, each with that KV, a CPU tensor
        [2, tokens, kv_heads, head_dim] of at most ``CHUNK_BYTES`` or of one token."""
        runs = torch.split(event.kv, self._block_tokens, dim=2)
        if self.stream is None:
            blocks: Iterator[Tensor] = (run.transpose(1, 2).contiguous() for run in runs)
        else:
            with torch.cuda.stream(self.stream):
                wait_for_kv(event)
                blocks = iter([_to_pinned(run.transpose(1, 2)) for run in runs])
                self.stream.synchronize()
        first_token = event.first_token
        for block in blocks:
            tokens = block.shape[1]
            yield pb.KvChunk(layer=event.layer, first_token=first_token, tokens=tokens), block
            first_token += tokens


class HostImporter:
    """Copies KV from the host's memory to the model's device."""

    def __init__(self, shape: HandoffShape, device: torch.device) -> None:
        self._shape = shape
        self._device = device
        self._stream = copy_stream(device)

    def _event(self, chunk: pb.KvChunk, data: bytearray) -> LayerKv:
        shape = self._shape
        size = chunk.tokens * shape.token_bytes
        if len(data) != size:
            raise ValueError(f"a chunk of {len(data)} bytes; expected {size}")
        kv = torch.frombuffer(data, dtype=shape.dtype)
        kv = kv.view(2, chunk.tokens, shape.kv_heads, shape.head_dim)
        check_finite(kv, "KV")
        ready = None
        if self._stream is not None:
            with torch.cuda.stream(self._stream):
                kv = kv.pin_memory().to(self._device, non_blocking=True)
                ready = self._stream.record_event()
        return LayerKv(
            layer=chunk.layer, first_token=chunk.first_token, kv=kv.transpose(1, 2), ready=ready
        )


def check_finite(values: Tensor, what: str) -> None:
    """Refuses NaN and infinite values of a tensor on the CPU, which is not empty.

    Args:
        what: its name in the error.

    Raises:
        ValueError: there is one.
    """
    low, high = torch.aminmax(values)  # NaN if a value is
    if not (torch.isfinite(low) and torch.isfinite(high)):
        raise ValueError(f"got NaN or an infinite value; allowed: finite {what}")


@cache
def copy_stream(device: torch.device) -> torch.cuda.Stream | None:
    """The stream on which a GPU's handoffs are copied; None for other devices. There is one for all
    calls, because torch's allocator keeps freed memory for the stream that used it."""
    if device.type != "cuda":
        return None
    return torch.cuda.Stream(device)  # type: ignore[no-untyped-call]


def wait_for_kv(event: LayerKv) -> None:
    """Lets the current stream wait until the event's KV is computed."""
    if event.ready is not None:
        torch.cuda.current_stream().wait_event(event.ready)


def _to_pinned(x: Tensor) -> Tensor:
    """A contiguous copy in pinned memory, complete once the current stream has run the copy."""
    source = x.contiguous()
    target = torch.empty(source.shape, dtype=source.dtype, pin_memory=True)
    return target.copy_(source, non_blocking=True)
