"""How KV travels: in the messages, through a segment both ends map, or in the sender's GPU memory.

Each way has a writer, Prefill's end, and a reader, Decode's. On a GPU both copy on streams of their
own, beside the model's work.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from typing import ClassVar, Protocol

import torch
from torch import Tensor

from griffin.v1 import prefill_pb2 as pb
from griffin_core.prefill import LayerKv
from griffin_server.transfer.cuda_ipc import (
    PROOF_BYTES,
    Lent,
    MappingError,
    Mappings,
    boot_id,
    can_share,
)
from griffin_server.transfer.shape import HandoffShape
from griffin_server.transfer.shared_memory import DATA_START, Segment, SegmentPool, attach_segment

Bytes = bytes | bytearray | memoryview

CHUNK_BYTES = 1 << 20

WORDS = {2: torch.int16, 4: torch.int32}
"""Integers of a value's size."""


class MemoryNotShared(Exception):
    """The other end's memory, which it says it lends, cannot be read here."""


class KvWriter(Protocol):
    """Prefill's end."""

    transport: ClassVar[pb.Transport.ValueType]

    stream: torch.cuda.Stream | None
    """Beside the model's, for copies to the host; None without a GPU."""

    lends: ClassVar[bool]
    """Whether the KV stays in this end's memory, which the other reads until it ends the call."""

    def prove(self, header: pb.PrefillHeader) -> None:
        """Puts into the header what proves the way."""
        ...

    def chunks(self, event: LayerKv) -> Iterator[tuple[pb.KvChunk, Bytes]]:
        """Messages for one event, each with what the checksum takes of it."""
        ...


class KvReader(Protocol):
    """Decode's end."""

    transport: ClassVar[pb.Transport.ValueType]

    def offer(self, request: pb.PrefillRequest) -> None:
        """Puts the offer of this way into the request."""
        ...

    def accept(self, header: pb.PrefillHeader) -> None:
        """Checks the proof of a header of this way.

        Raises:
            ValueError: there is none, or it is wrong.
            MemoryNotShared: it cannot be read from here.
        """
        ...

    def read(self, chunk: pb.KvChunk) -> tuple[LayerKv, Bytes]:
        """The event of a message, and what the checksum takes of it.

        Raises:
            ValueError: the message is not right.
            MemoryNotShared: as in ``accept``.
        """
        ...

    def close(self, *, whole: bool) -> None:
        """Gives back what the way took.

        Args:
            whole: the other end has written all it will.
        """
        ...


def writer_for(request: pb.PrefillRequest, shape: HandoffShape, device: torch.device) -> KvWriter:
    """The best way of those a request offers, by chunks if none of them can be."""
    if request.HasField("cuda_memory"):
        here = can_share(device) and request.cuda_memory.boot_id == boot_id()
        if here and shape.dtype.itemsize in WORDS:
            try:
                return CudaWriter(shape, device, Lent(device))
            except MappingError:
                pass
    offer = request.shared_memory
    if offer.name and offer.size_bytes >= DATA_START + shape.kv_bytes:
        segment = attach_segment(offer.name, offer.size_bytes, offer.nonce)
        if segment is not None:
            return SharedMemoryWriter(shape, segment, device)
    return ChunkWriter(shape, device)


class _HostWriter:
    """Brings KV to the host."""

    lends: ClassVar[bool] = False

    def __init__(self, shape: HandoffShape, device: torch.device) -> None:
        self._at_once = max(1, CHUNK_BYTES // shape.token_bytes)
        self.stream = _side_stream(device)

    def _blocks(self, event: LayerKv) -> Iterator[tuple[pb.KvChunk, Tensor]]:
        """Messages still without their KV, and that KV [2, tokens, kv_heads, head_dim] on the CPU:
        at most CHUNK_BYTES, but one token at least."""
        runs = torch.split(event.kv, self._at_once, dim=2)
        if self.stream is None:
            blocks: Iterator[Tensor] = (run.transpose(1, 2).contiguous() for run in runs)
        else:
            with torch.cuda.stream(self.stream):
                _wait_for(event)
                blocks = iter([_pinned(run.transpose(1, 2)) for run in runs])
                self.stream.synchronize()
        first_token = event.first_token
        for block in blocks:
            tokens = block.shape[1]
            yield pb.KvChunk(layer=event.layer, first_token=first_token, tokens=tokens), block
            first_token += tokens


class ChunkWriter(_HostWriter):
    """KV in the messages themselves."""

    transport: ClassVar = pb.TRANSPORT_CHUNKS

    def prove(self, header: pb.PrefillHeader) -> None:
        pass

    def chunks(self, event: LayerKv) -> Iterator[tuple[pb.KvChunk, Bytes]]:
        for chunk, block in self._blocks(event):
            chunk.data = block.reshape(-1).view(torch.uint8).numpy().tobytes()
            yield chunk, chunk.data


class SharedMemoryWriter(_HostWriter):
    """KV in a segment of the other end's."""

    transport: ClassVar = pb.TRANSPORT_SHARED_MEMORY

    def __init__(self, shape: HandoffShape, segment: Segment, device: torch.device) -> None:
        super().__init__(shape, device)
        self._segment = segment
        self._offset = DATA_START

    def prove(self, header: pb.PrefillHeader) -> None:
        header.proof = self._segment.write_nonce()

    def chunks(self, event: LayerKv) -> Iterator[tuple[pb.KvChunk, Bytes]]:
        for chunk, block in self._blocks(event):
            chunk.segment_offset_bytes = self._offset
            written = self._segment.write(self._offset, block)
            self._offset += len(written)
            yield chunk, written


class CudaWriter:
    """KV where the model wrote it."""

    transport: ClassVar = pb.TRANSPORT_CUDA_MEMORY
    lends: ClassVar[bool] = True

    def __init__(self, shape: HandoffShape, device: torch.device, lent: Lent) -> None:
        self._lent = lent
        self._words = WORDS[shape.dtype.itemsize]
        self.stream = _side_stream(device)

    def prove(self, header: pb.PrefillHeader) -> None:
        header.proof = self._lent.proof
        header.proof_place.CopyFrom(self._lent.proof_place)

    def chunks(self, event: LayerKv) -> Iterator[tuple[pb.KvChunk, Bytes]]:
        with torch.cuda.stream(self.stream):
            _wait_for(event)
            digest = _digest(event.kv, self._words)
        yield (
            pb.KvChunk(
                layer=event.layer,
                first_token=event.first_token,
                tokens=event.kv.shape[2],
                place=self._lent.lend(event.kv),
            ),
            digest,
        )


class _HostReader:
    """Takes KV from the host's memory to the model's device."""

    def __init__(self, shape: HandoffShape, device: torch.device) -> None:
        self._shape = shape
        self._device = device
        self._stream = _side_stream(device)

    def _event(self, chunk: pb.KvChunk, data: bytearray) -> LayerKv:
        shape = self._shape
        size = chunk.tokens * shape.token_bytes
        if len(data) != size:
            raise ValueError(f"a chunk of {len(data)} bytes; expected {size}")
        kv = torch.frombuffer(data, dtype=shape.dtype)
        kv = kv.view(2, chunk.tokens, shape.kv_heads, shape.head_dim)
        ready = None
        if self._stream is not None:
            with torch.cuda.stream(self._stream):
                kv = kv.pin_memory().to(self._device, non_blocking=True)
                ready = self._stream.record_event()
        return LayerKv(
            layer=chunk.layer, first_token=chunk.first_token, kv=kv.transpose(1, 2), ready=ready
        )


class ChunkReader(_HostReader):
    """KV in the messages themselves."""

    transport: ClassVar = pb.TRANSPORT_CHUNKS

    def offer(self, request: pb.PrefillRequest) -> None:
        pass

    def accept(self, header: pb.PrefillHeader) -> None:
        pass

    def read(self, chunk: pb.KvChunk) -> tuple[LayerKv, Bytes]:
        return self._event(chunk, bytearray(chunk.data)), chunk.data

    def close(self, *, whole: bool) -> None:
        pass


class SharedMemoryReader(_HostReader):
    """KV in a segment of this end's.

    Args:
        segment: taken of ``pool``.
    """

    transport: ClassVar = pb.TRANSPORT_SHARED_MEMORY

    def __init__(
        self, shape: HandoffShape, device: torch.device, segment: Segment, pool: SegmentPool
    ) -> None:
        super().__init__(shape, device)
        self._segment = segment
        self._pool = pool
        self._nonce = segment.write_nonce()

    def offer(self, request: pb.PrefillRequest) -> None:
        request.shared_memory.name = self._segment.name
        request.shared_memory.size_bytes = self._segment.size_bytes
        request.shared_memory.nonce = self._nonce

    def accept(self, header: pb.PrefillHeader) -> None:
        if header.proof == self._nonce or header.proof != self._segment.read_nonce():
            raise ValueError("the shared-memory segment is not proved")

    def read(self, chunk: pb.KvChunk) -> tuple[LayerKv, Bytes]:
        size = chunk.tokens * self._shape.token_bytes
        data = self._segment.read(chunk.segment_offset_bytes, size)
        return self._event(chunk, data), data

    def close(self, *, whole: bool) -> None:
        if whole:
            self._pool.give_back(self._segment)
        else:  # the other end may still be writing
            self._segment.unlink()


class CudaReader:
    """KV in the other end's GPU memory, copied from there to this end's."""

    transport: ClassVar = pb.TRANSPORT_CUDA_MEMORY

    def __init__(self, shape: HandoffShape, device: torch.device) -> None:
        self._shape = shape
        self._device = device
        self._words = WORDS[shape.dtype.itemsize]
        self._stream = _side_stream(device)
        self._mappings = Mappings(device)

    def offer(self, request: pb.PrefillRequest) -> None:
        request.cuda_memory.boot_id = boot_id()

    def accept(self, header: pb.PrefillHeader) -> None:
        with torch.cuda.stream(self._stream):
            found = torch.zeros(PROOF_BYTES, dtype=torch.uint8, device=self._device)
            self._copy(header.proof_place, found, rows=1)
            proved = bytes(found.tolist()) == header.proof
        if not proved:
            raise MemoryNotShared("the proof is not where it should be")

    def read(self, chunk: pb.KvChunk) -> tuple[LayerKv, Bytes]:
        heads, head_dim = self._shape.kv_heads, self._shape.head_dim
        with torch.cuda.stream(self._stream):
            kv = torch.empty(
                (2, heads, chunk.tokens, head_dim), dtype=self._shape.dtype, device=self._device
            )
            self._copy(chunk.place, kv, rows=2 * heads)
            digest = _digest(kv, self._words)
            ready = torch.cuda.current_stream().record_event()
        event = LayerKv(layer=chunk.layer, first_token=chunk.first_token, kv=kv, ready=ready)
        return event, digest

    def _copy(self, place: pb.CudaPlace, out: Tensor, *, rows: int) -> None:
        try:
            self._mappings.copy(place, out, rows=rows)
        except MappingError as error:
            raise MemoryNotShared(str(error)) from error

    def close(self, *, whole: bool) -> None:
        if self._stream is not None:
            self._stream.synchronize()
        self._mappings.close()


@cache
def _side_stream(device: torch.device) -> torch.cuda.Stream | None:
    """The one stream of a GPU that copies run on, beside the model's. Not one a call: memory that
    a stream has freed is kept for that stream."""
    if device.type != "cuda":
        return None
    return torch.cuda.Stream(device)  # type: ignore[no-untyped-call]


def _wait_for(event: LayerKv) -> None:
    if event.ready is not None:
        torch.cuda.current_stream().wait_event(event.ready)


def _pinned(x: Tensor) -> Tensor:
    """A contiguous copy of it in pinned memory, whole once the current stream has come so far."""
    there = x.contiguous()
    here = torch.empty(there.shape, dtype=there.dtype, pin_memory=True)
    return here.copy_(there, non_blocking=True)


def _digest(kv: Tensor, words: torch.dtype) -> bytes:
    """The sum of its values as integers, 8 bytes; waits for the current stream."""
    return int(kv.view(words).sum(dtype=torch.int64)).to_bytes(8, "little", signed=True)
