"""The transport that puts KV into the gRPC messages themselves. It works between any two hosts."""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar

import torch

from griffin.v1 import prefill_pb2 as pb
from griffin_core.forward.events import (
    LayerKv,
)
from griffin_server.transfer.base import Bytes, HostExporter, HostImporter


class MessagesExporter(HostExporter):
    """Prefill's end."""

    transport: ClassVar = pb.TRANSPORT_CHUNKS

    def write_proof(self, header: pb.PrefillHeader) -> None:
        """Needs none."""

    def chunks(self, event: LayerKv) -> Iterator[tuple[pb.KvChunk, Bytes]]:
        for chunk, block in self._blocks(event):
            chunk.data = block.reshape(-1).view(torch.uint8).numpy().tobytes()
            yield chunk, chunk.data


class MessagesImporter(HostImporter):
    """Decode's end."""

    transport: ClassVar = pb.TRANSPORT_CHUNKS

    def offer(self, request: pb.PrefillRequest) -> None:
        """Offers nothing: every prefill server can send KV in messages."""

    def verify(self, header: pb.PrefillHeader) -> None:
        """Has nothing to check."""

    def read(self, chunk: pb.KvChunk) -> tuple[LayerKv, Bytes]:
        return self._event(chunk, bytearray(chunk.data)), chunk.data

    def close(self, *, complete: bool) -> None:
        """Has nothing to release."""
