"""The handoff between its messages and the core's events, both ways, with its checksum."""

from __future__ import annotations

import zlib
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from griffin.v1 import prefill_pb2 as pb
from griffin_core.errors import CapacityExhausted, FingerprintMismatch, HandoffBroken
from griffin_core.experts.expert_set import pack_indices, unpack_indices
from griffin_core.prefill import LayerExperts, LayerKv, PrefillEvent, PrefillFinished
from griffin_server.transfer.base import ChunkReader, KvReader, KvWriter
from griffin_server.transfer.shape import HandoffShape

TENSOR_TYPES = {
    torch.float32: pb.TENSOR_TYPE_FLOAT32,
    torch.bfloat16: pb.TENSOR_TYPE_BFLOAT16,
    torch.float16: pb.TENSOR_TYPE_FLOAT16,
}


class HandoffWriter:
    """Prefill's side: core events in, messages out.

    Args:
        way: how the KV goes.
    """

    def __init__(self, shape: HandoffShape, way: KvWriter) -> None:
        self._shape = shape
        self._way = way
        self._crc = 0

    def header(self) -> pb.PrefillResponse:
        """The first message. Proves the way the KV goes, where that wants proof."""
        shape = self._shape
        header = pb.PrefillHeader(
            model_fingerprint=shape.fingerprint,
            layers=shape.layers,
            kv_heads=shape.kv_heads,
            head_dim=shape.head_dim,
            ff_width=shape.ff_width,
            width=shape.width,
            kv_type=TENSOR_TYPES[shape.dtype],
            tokens=shape.tokens,
            experts_per_layer=shape.experts_per_layer,
            transport=self._way.transport,
        )
        self._way.prove(header)
        return pb.PrefillResponse(header=header)

    def kv(self, event: LayerKv) -> Iterator[pb.PrefillResponse]:
        for chunk, covered in self._way.chunks(event):
            self._crc = zlib.crc32(covered, self._crc)
            yield pb.PrefillResponse(kv=chunk)

    def experts(self, event: LayerExperts) -> pb.PrefillResponse:
        with torch.cuda.stream(self._way.stream):  # they are there, and the model is not waited for
            s = pack_floats(event.s)
            experts = pack_indices(event.experts)
        self._crc = zlib.crc32(experts, zlib.crc32(s, self._crc))
        return pb.PrefillResponse(experts=pb.LayerExperts(layer=event.layer, s=s, experts=experts))

    def finished(self, event: PrefillFinished, queue_s: float) -> pb.PrefillResponse:
        """The last message, with the checksum of all before it."""
        with torch.cuda.stream(self._way.stream):
            hidden = pack_floats(event.last_hidden)
        self._crc = zlib.crc32(hidden, self._crc)
        return pb.PrefillResponse(
            finished=pb.PrefillFinished(
                last_hidden=hidden,
                checksum=self._crc,
                queue_s=queue_s,
                compute_s=event.compute_s,
                selection_s=event.selection_s,
            )
        )


class HandoffReader:
    """Decode's side: messages in, core events out; trusts nothing it is sent.

    Args:
        shape: what this side expects.
        offered: the way that was offered for the KV.
        otherwise: by chunks, if the other side cannot go that way.
    """

    def __init__(self, shape: HandoffShape, offered: KvReader, otherwise: ChunkReader) -> None:
        self._shape = shape
        self._offered = offered
        self._otherwise = otherwise
        self._way: KvReader | None = None
        self._crc = 0
        self.finished = False
        """Whether the handoff is whole and verified."""

    @property
    def transport(self) -> str:
        """The way the KV comes, in lower case."""
        assert self._way is not None
        name = pb.Transport.Name(self._way.transport)
        return name.removeprefix("TRANSPORT_").lower()

    @property
    def declined(self) -> bool:
        """Whether the other side did not go the way that was offered."""
        return self._way is not None and self._way.transport != self._offered.transport

    def read(self, message: pb.PrefillResponse) -> PrefillEvent | None:
        """The event of a message; None for the header.

        Raises:
            FingerprintMismatch: the header is another model's.
            HandoffBroken: the message is not what must come now, or the checksum differs.
            MemoryNotShared: the way that was offered and taken does not work after all.
            CapacityExhausted: this side's device has no room for the KV.
        """
        kind = message.WhichOneof("event")
        if self.finished or (kind == "header") is (self._way is not None):
            raise HandoffBroken(f"handoff: got a message {kind!r} out of order")
        try:
            match kind:
                case "header":
                    self._header(message.header)
                    return None
                case "kv":
                    return self._kv(message.kv)
                case "experts":
                    return self._experts(message.experts)
                case "finished":
                    return self._finished(message.finished)
        except ValueError as error:
            raise HandoffBroken(f"handoff: {error}") from error
        except torch.OutOfMemoryError as error:  # here, and no fault of the other side
            raise CapacityExhausted(f"device memory: {error}", retry_after_s=1.0) from error
        raise HandoffBroken("handoff: got a message of an unknown kind")

    def _header(self, header: pb.PrefillHeader) -> None:
        shape = self._shape
        if header.model_fingerprint != shape.fingerprint:
            raise FingerprintMismatch(
                f"model_fingerprint: prefill has {header.model_fingerprint[:12]}..., "
                f"decode has {shape.fingerprint[:12]}..."
            )
        theirs = {
            "layers": header.layers,
            "kv_heads": header.kv_heads,
            "head_dim": header.head_dim,
            "ff_width": header.ff_width,
            "width": header.width,
            "tokens": header.tokens,
            "experts_per_layer": header.experts_per_layer,
        }
        differ = {name: given for name, given in theirs.items() if given != getattr(shape, name)}
        if differ or header.kv_type != TENSOR_TYPES[shape.dtype]:
            raise HandoffBroken(
                f"handoff: the header does not fit the request: {differ or 'dtype'}"
            )
        ways = [
            way for way in (self._offered, self._otherwise) if way.transport == header.transport
        ]
        if not ways:
            raise HandoffBroken("handoff: the KV is to come by a way that was not offered")
        ways[0].accept(header)
        self._way = ways[0]

    def _kv(self, chunk: pb.KvChunk) -> LayerKv:
        assert self._way is not None
        if not 0 < chunk.tokens <= self._shape.tokens:
            raise HandoffBroken(
                f"handoff: a chunk of {chunk.tokens} of {self._shape.tokens} tokens"
            )
        event, covered = self._way.read(chunk)
        self._crc = zlib.crc32(covered, self._crc)
        return event

    def _experts(self, message: pb.LayerExperts) -> LayerExperts:
        self._crc = zlib.crc32(message.experts, zlib.crc32(message.s, self._crc))
        experts = unpack_indices(
            message.experts, self._shape.ff_width, f"experts of layer {message.layer}"
        )
        return LayerExperts(layer=message.layer, s=_floats(message.s), experts=experts)

    def _finished(self, message: pb.PrefillFinished) -> PrefillFinished:
        self._crc = zlib.crc32(message.last_hidden, self._crc)
        if self._crc != message.checksum:
            raise HandoffBroken(
                f"handoff: checksum is {self._crc:#010x}, the sender's {message.checksum:#010x}"
            )
        last_hidden = _floats(message.last_hidden)
        if last_hidden.numel() != self._shape.width:
            raise HandoffBroken(f"handoff: a hidden state of {last_hidden.numel()} values")
        self.finished = True
        return PrefillFinished(
            last_hidden=last_hidden,
            compute_s=message.compute_s,
            selection_s=message.selection_s,
        )


def pack_floats(values: Tensor) -> bytes:
    """float32 [...] -> little-endian float32, in order."""
    return values.cpu().numpy().astype("<f4", copy=False).tobytes()


def _floats(data: bytes) -> Tensor:
    return torch.from_numpy(np.frombuffer(data, dtype="<f4").astype(np.float32))
