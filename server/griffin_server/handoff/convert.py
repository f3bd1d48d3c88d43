"""The handoff between its messages and the core's events, both ways, with its checksum."""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from griffin.v1 import prefill_pb2 as pb
from griffin_core.errors import FingerprintMismatch, HandoffBroken
from griffin_core.experts.expert_set import pack_indices, unpack_indices
from griffin_core.model.load import Model
from griffin_core.prefill import LayerExperts, LayerKv, PrefillEvent, PrefillFinished
from griffin_core.prefill_queue import PrefillTask
from griffin_server.handoff.shared_memory import DATA_START, Segment

CHUNK_BYTES = 1 << 20

TENSOR_TYPES = {
    torch.float32: pb.TENSOR_TYPE_FLOAT32,
    torch.bfloat16: pb.TENSOR_TYPE_BFLOAT16,
    torch.float16: pb.TENSOR_TYPE_FLOAT16,
}


@dataclass(frozen=True, kw_only=True)
class HandoffShape:
    """What both ends must agree on for bytes to mean the same.

    Args:
        tokens: T of this prompt.
        experts_per_layer: K of this request.
    """

    fingerprint: str
    layers: int
    kv_heads: int
    head_dim: int
    ff_width: int
    width: int
    dtype: torch.dtype
    tokens: int
    experts_per_layer: int

    @property
    def token_bytes(self) -> int:
        """Keys and values of one token in one layer."""
        return 2 * self.kv_heads * self.head_dim * self.dtype.itemsize

    @property
    def kv_bytes(self) -> int:
        """Keys and values of all tokens in all layers."""
        return self.layers * self.tokens * self.token_bytes


def handoff_shape(model: Model, task: PrefillTask) -> HandoffShape:
    """The shape of a task's handoff from or to ``model``."""
    spec = model.decoder.spec
    return HandoffShape(
        fingerprint=model.fingerprint,
        layers=len(spec.layers),
        kv_heads=spec.kv_heads,
        head_dim=spec.head_dim,
        ff_width=spec.ff_width,
        width=spec.width,
        dtype=model.decoder.dtype,
        tokens=len(task.token_ids),
        experts_per_layer=task.selection.experts_of(spec.ff_width),
    )


class HandoffWriter:
    """Prefill's side: core events in, messages out.

    Args:
        segment: where the KV goes; None sends it in the messages.
    """

    def __init__(self, shape: HandoffShape, segment: Segment | None) -> None:
        self._shape = shape
        self._segment = segment
        self._offset = DATA_START
        self._crc = 0

    def header(self) -> pb.PrefillResponse:
        """The first message. Proves the segment, if there is one, by writing to it."""
        shape, segment = self._shape, self._segment
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
            transport=pb.TRANSPORT_SHARED_MEMORY if segment else pb.TRANSPORT_CHUNKS,
            proof=segment.write_nonce() if segment else b"",
        )
        return pb.PrefillResponse(header=header)

    def kv(self, event: LayerKv) -> Iterator[pb.PrefillResponse]:
        """Messages of at most CHUNK_BYTES, but of one token at least."""
        at_once = max(1, CHUNK_BYTES // self._shape.token_bytes)
        first_token = event.first_token
        for run in torch.split(event.kv, at_once, dim=2):
            block = run.transpose(1, 2).contiguous().cpu()
            tokens = block.shape[1]
            chunk = pb.KvChunk(layer=event.layer, first_token=first_token, tokens=tokens)
            first_token += tokens
            if self._segment is None:
                chunk.data = _bytes_of(block)
                self._crc = zlib.crc32(chunk.data, self._crc)
            else:
                chunk.segment_offset_bytes = self._offset
                written = self._segment.write(self._offset, block)
                self._crc = zlib.crc32(written, self._crc)
                self._offset += len(written)
            yield pb.PrefillResponse(kv=chunk)

    def experts(self, event: LayerExperts) -> pb.PrefillResponse:
        s = event.s.cpu().numpy().astype("<f4", copy=False).tobytes()
        experts = pack_indices(event.experts)
        self._crc = zlib.crc32(experts, zlib.crc32(s, self._crc))
        return pb.PrefillResponse(experts=pb.LayerExperts(layer=event.layer, s=s, experts=experts))

    def finished(self, event: PrefillFinished, queue_s: float) -> pb.PrefillResponse:
        """The last message, with the checksum of all before it."""
        hidden = event.last_hidden.cpu().numpy().astype("<f4", copy=False).tobytes()
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
        segment: the one that was offered, or None.
    """

    def __init__(self, shape: HandoffShape, segment: Segment | None) -> None:
        self._shape = shape
        self._segment = segment
        self._nonce = segment.write_nonce() if segment else b""
        self._begun = False
        self._crc = 0
        self.finished = False
        """Whether the handoff is whole and verified."""

    @property
    def nonce(self) -> bytes:
        """What stands at the start of the segment, for the offer."""
        return self._nonce

    @property
    def segment_refused(self) -> bool:
        """Whether the other side could not use the segment that was offered."""
        return self._begun and bool(self._nonce) and self._segment is None

    def read(self, message: pb.PrefillResponse) -> PrefillEvent | None:
        """The event of a message; None for the header.

        Raises:
            FingerprintMismatch: the header is another model's.
            HandoffBroken: the message is not what must come now, or the checksum differs.
        """
        kind = message.WhichOneof("event")
        if self.finished or (kind == "header") is self._begun:
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
        if header.transport == pb.TRANSPORT_SHARED_MEMORY:
            proof = header.proof
            if not self._segment or proof == self._nonce or proof != self._segment.read_nonce():
                raise HandoffBroken("handoff: the shared-memory segment is not proved")
        else:
            self._segment = None
        self._begun = True

    def _kv(self, chunk: pb.KvChunk) -> LayerKv:
        shape = self._shape
        size = chunk.tokens * shape.token_bytes
        if not 0 < chunk.tokens <= shape.tokens:
            raise HandoffBroken(f"handoff: a chunk of {chunk.tokens} of {shape.tokens} tokens")
        if self._segment is None:
            data = bytearray(chunk.data)
        else:
            data = self._segment.read(chunk.segment_offset_bytes, size)
        if len(data) != size:
            raise HandoffBroken(f"handoff: a chunk of {len(data)} bytes; expected {size}")
        self._crc = zlib.crc32(data, self._crc)
        block = torch.frombuffer(data, dtype=shape.dtype)
        kv = block.view(2, chunk.tokens, shape.kv_heads, shape.head_dim).transpose(1, 2)
        return LayerKv(layer=chunk.layer, first_token=chunk.first_token, kv=kv)

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


def _bytes_of(tensor: Tensor) -> bytes:
    return tensor.reshape(-1).view(torch.uint8).numpy().tobytes()


def _floats(data: bytes) -> Tensor:
    return torch.from_numpy(np.frombuffer(data, dtype="<f4").astype(np.float32))
