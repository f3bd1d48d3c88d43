"""The handoff's codec: core events to messages and back, with a checksum over all of them."""

from __future__ import annotations

import zlib
from collections.abc import Iterator

import torch

from griffin.v1 import prefill_pb2 as pb
from griffin_core.errors import CapacityExhausted, FingerprintMismatch, HandoffBroken
from griffin_core.experts.correction import LayerCorrection
from griffin_core.experts.expert_set import pack_indices, unpack_indices
from griffin_core.forward.events import (
    LayerExperts,
    LayerKv,
    PrefillEvent,
    PrefillFinished,
)
from griffin_server.rpc.messages.tensors import (
    pack_floats,
    pack_tensor,
    unpack_floats,
    unpack_tensor,
)
from griffin_server.transfer import protocol
from griffin_server.transfer.base import KvExporter, KvImporter, check_finite
from griffin_server.transfer.messages import MessagesImporter
from griffin_server.transfer.progress import Progress
from griffin_server.transfer.shape import HandoffShape

TENSOR_TYPES = {
    torch.float32: pb.TENSOR_TYPE_FLOAT32,
    torch.bfloat16: pb.TENSOR_TYPE_BFLOAT16,
    torch.float16: pb.TENSOR_TYPE_FLOAT16,
}


class HandoffWriter:
    """The prefill server's side, from core events to messages.

    Args:
        exporter: the transport of the KV.
        version: of the protocol, as negotiated.
    """

    def __init__(
        self, shape: HandoffShape, exporter: KvExporter, version: int = protocol.NEWEST
    ) -> None:
        self._shape = shape
        self._version = version
        self._exporter = exporter
        self._crc = 0

    def header(self) -> pb.PrefillResponse:
        """The first message, with the transport's proof where that needs one."""
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
            experts=shape.experts,
            protocol_version=self._version,
            transport=self._exporter.transport,
        )
        self._exporter.write_proof(header)
        return pb.PrefillResponse(header=header)

    def kv(self, event: LayerKv) -> Iterator[pb.PrefillResponse]:
        """The messages for a layer's keys and values of some tokens."""
        for chunk, covered in self._exporter.chunks(event):
            self._crc = zlib.crc32(covered, self._crc)
            yield pb.PrefillResponse(kv=chunk)

    def experts(self, event: LayerExperts) -> pb.PrefillResponse:
        """The message for a layer's statistic and experts."""
        # They are computed already, and the copy must not wait for the model's stream.
        with torch.cuda.stream(self._exporter.stream):
            s2, squares, values = event.sums.unbind()
            message = pb.LayerExperts(
                layer=event.layer,
                s=pack_floats(s2.sqrt()),
                experts=pack_indices(event.experts),
                squares=pack_floats(squares),
                values=pack_floats(values),
            )
            if (own := event.correction) is not None:
                message.bias = pack_tensor(own.bias)
                if own.into is not None and own.out is not None:
                    message.into, message.out = pack_tensor(own.into), pack_tensor(own.out)
        self._crc = _crc_of(message, self._crc)
        return pb.PrefillResponse(experts=message)

    def finished(self, event: PrefillFinished, queue_s: float) -> pb.PrefillResponse:
        """The last message, with the checksum of the whole handoff."""
        with torch.cuda.stream(self._exporter.stream):
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


def _crc_of(message: pb.LayerExperts, crc: int) -> int:
    """Continues a checksum over the fields of a message, in the order of their numbers."""
    for data in (
        message.s,
        message.experts,
        message.squares,
        message.values,
        message.bias,
        message.into,
        message.out,
    ):
        crc = zlib.crc32(data, crc)
    return crc


class HandoffReader:
    """The decode server's side, from messages to core events. It trusts no message.

    Args:
        shape: the shape that the request asked for.
        offered: the transport that the request offered for the KV.
        fallback: the transport in messages, for a prefill server that cannot use ``offered``.
    """

    def __init__(
        self, shape: HandoffShape, offered: KvImporter, fallback: MessagesImporter
    ) -> None:
        self._shape = shape
        self._offered = offered
        self._fallback = fallback
        self._importer: KvImporter | None = None
        self._crc = 0
        self._progress = Progress(shape)
        self.finished = False
        """Whether the handoff is complete and verified."""

    @property
    def transport(self) -> str:
        """The transport that the prefill server chose, in lower case."""
        assert self._importer is not None
        name = pb.Transport.Name(self._importer.transport)
        return name.removeprefix("TRANSPORT_").lower()

    @property
    def declined(self) -> bool:
        """Whether the prefill server did not choose the transport that was offered."""
        return self._importer is not None and self._importer.transport != self._offered.transport

    def read(self, message: pb.PrefillResponse) -> PrefillEvent | None:
        """The event of a message; None for the header.

        Raises:
            ProtocolMismatch: the header is in a version of the protocol that was not asked for.
            FingerprintMismatch: the header names another model.
            HandoffBroken: the message is out of order or malformed, or the checksum differs.
            MemoryNotShared: the transport that was offered and chosen does not work.
            CapacityExhausted: this server's device has no room for the KV.
        """
        kind = message.WhichOneof("event")
        if self.finished or (kind == "header") is (self._importer is not None):
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
        except torch.OutOfMemoryError as error:  # this server's fault, not the sender's
            raise CapacityExhausted(f"device memory: {error}", retry_after_s=1.0) from error
        raise HandoffBroken("handoff: got a message of an unknown kind")

    def _header(self, header: pb.PrefillHeader) -> None:
        shape = self._shape
        protocol.check_answer(header)
        if header.model_fingerprint != shape.fingerprint:
            raise FingerprintMismatch(
                f"model_fingerprint: the prefill server answers for another model than "
                f"{shape.fingerprint[:12]}..."
            )
        theirs = {
            "layers": header.layers,
            "kv_heads": header.kv_heads,
            "head_dim": header.head_dim,
            "ff_width": header.ff_width,
            "width": header.width,
            "tokens": header.tokens,
            "experts": header.experts,
        }
        differ = [name for name, given in theirs.items() if given != getattr(shape, name)]
        if header.kv_type != TENSOR_TYPES[shape.dtype]:
            differ.append("kv_type")
        if differ:
            raise HandoffBroken(
                f"handoff: the header does not fit the request: {', '.join(differ)}"
            )
        for importer in (self._offered, self._fallback):
            if importer.transport == header.transport:
                importer.verify(header)
                self._importer = importer
                return
        raise HandoffBroken("handoff: the header names a transport that was not offered")

    def _kv(self, chunk: pb.KvChunk) -> LayerKv:
        assert self._importer is not None
        if not 0 < chunk.tokens <= self._shape.tokens:
            raise HandoffBroken(
                f"handoff: a chunk of {chunk.tokens} of {self._shape.tokens} tokens"
            )
        event, covered = self._importer.read(chunk)
        self._crc = zlib.crc32(covered, self._crc)
        self._progress.kv(event)
        return event

    def _experts(self, message: pb.LayerExperts) -> LayerExperts:
        self._crc = _crc_of(message, self._crc)
        width, layer = self._shape.ff_width, message.layer
        experts = unpack_indices(message.experts, width, f"experts of layer {layer}")
        sums = []
        for name, data in (
            ("s", message.s),
            ("squares", message.squares),
            ("values", message.values),
        ):
            values = unpack_floats(data)
            if len(values) != width:
                raise ValueError(f"{name} of layer {layer}: got {len(values)}; allowed: {width}")
            values = values.square() if name == "s" else values
            check_finite(values, name)
            sums.append(values)
        event = LayerExperts(
            layer=layer,
            sums=torch.stack(sums),
            experts=experts,
            correction=self._correction(message),
        )
        self._progress.experts(event)
        return event

    def _correction(self, message: pb.LayerExperts) -> LayerCorrection | None:
        """The correction of a layer, of no higher rank than was asked for; None if it has none.

        Raises:
            ValueError: its shape is another.
        """
        given = {"bias": message.bias, "into": message.into, "out": message.out}
        if not any(given.values()):
            return None
        shape, most = self._shape, self._shape.correction
        vector = shape.width * shape.dtype.itemsize
        ranks = [len(given[name]) // vector for name in ("into", "out")]
        fits = all(len(data) % vector == 0 for data in given.values())
        whole = fits and len(given["bias"]) == vector and len(set(ranks)) == 1
        if most.kind == "none" or not whole or ranks[0] > most.rank:
            sizes = ", ".join(f"{len(data)} bytes of {name}" for name, data in given.items())
            raise ValueError(
                f"correction of layer {message.layer}: got {sizes}; allowed: {most.kind} of rank "
                f"up to {most.rank}, each vector {vector} bytes"
            )
        read = {name: unpack_tensor(data, shape.dtype) for name, data in given.items() if data}
        for name, values in read.items():
            check_finite(values, name)
        maps = {
            name: read[name].view(ranks[0], shape.width) for name in ("into", "out") if ranks[0]
        }
        return LayerCorrection(bias=read["bias"], **maps)

    def _finished(self, message: pb.PrefillFinished) -> PrefillFinished:
        self._crc = zlib.crc32(message.last_hidden, self._crc)
        if self._crc != message.checksum:
            raise HandoffBroken(
                f"handoff: checksum is {self._crc:#010x}, the sender's {message.checksum:#010x}"
            )
        last_hidden = unpack_floats(message.last_hidden)
        if last_hidden.numel() != self._shape.width:
            raise HandoffBroken(f"handoff: a hidden state of {last_hidden.numel()} values")
        check_finite(last_hidden, "hidden state")
        self._progress.finish()
        self.finished = True
        return PrefillFinished(
            last_hidden=last_hidden,
            compute_s=message.compute_s,
            selection_s=message.selection_s,
        )
